// The norm_act loops, one set of functions for each instruction set.
#pragma once
#include "common/operand.h"

namespace smis {

struct NormActArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, P = 0;  // P: pixels
  Operand x, residual, out;     // residual.data is null where there is none
  const void *mean = nullptr, *rstd = nullptr;  // (N or 1, C)
  int64_t stat_n = 0;           // 0 where one row of statistics serves the batch
  double slope = 1;
  bool stream = false;          // the output is too large to stay in cache: write past it
  // Backward: the incoming gradient, and the two sums: plane layout (N, C) each, sums_stride apart;
  // row layout: partial sums (N, chunks of `chunk` pixels, 2, C).
  Operand grad;
  void* sums = nullptr;
  int64_t sums_stride = 0, chunk = 0;
};

}  // namespace smis

// Ranges: planes (n, c); rows (n, chunk).
SMIS_DECLARE_KERNEL(norm_act_planes_kernel, const NormActArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(norm_act_rows_kernel, const NormActArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(norm_act_backward_planes_kernel, const NormActArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(norm_act_backward_rows_kernel, const NormActArgs&, int64_t begin, int64_t end)
