// Arguments of the modulation loops. Offsets count elements; "plane" layout is NCHW with dense
// planes, "row" layout is NHWC with dense channels.
#pragma once
#include "common/isa.h"

namespace smis {

// A (N, C, H, W) operand: its base and the strides of n, c and of a pixel.
struct Operand {
  void* data = nullptr;
  int64_t n = 0, c = 0, p = 0;
};

// One output of the pair: statistics (N or 1, C), gamma, beta and the output itself.
struct ModulationBranch {
  const void *mean = nullptr, *rstd = nullptr;
  int64_t stat_n = 0;  // 0 where one row of statistics serves the batch
  Operand gamma, beta, out;
  Operand grad, dgamma, dbeta;  // backward only; `out` is then the saved output
  double slope = 1;
};

struct ModulationArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, H = 0, W = 0;
  bool upsample = false;
  int branches = 1;
  ModulationBranch branch[2];
  Operand x, dx;
  bool stream = false;  // the output is too large to stay in cache: write past it
  // Backward, plane layout: the two sums (N, C), sums_stride apart; row layout: partial sums
  // (N, chunks of `chunk` source rows, 2, C).
  void* sums = nullptr;
  int64_t sums_stride = 0, chunk = 0;
};

struct MomentsArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, P = 0;  // P: pixels
  Operand x;
  void *mean = nullptr, *var = nullptr;  // (N, C)
  double* partial = nullptr;             // row layout: (N, chunks, 2, C)
  int64_t chunk = 0;                     // row layout: pixels in a chunk
};

struct CenterArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, P = 0;
  Operand grad, x, dx;
  const void *mean = nullptr, *rstd = nullptr, *shift = nullptr, *scale = nullptr;
  int64_t stat_n = 0;
};

}  // namespace smis

// Ranges in plane / row layout: apply (n, c, h) / (n, h); backward and moments (n, c) / (n, chunk);
// center (n, c) / (n, pixel).
SMIS_DECLARE_KERNEL(modulation_planes_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_rows_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_backward_planes_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_backward_rows_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(moments_planes_kernel, const MomentsArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(moments_rows_kernel, const MomentsArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(center_planes_kernel, const CenterArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(center_rows_kernel, const CenterArgs&, int64_t begin, int64_t end)
