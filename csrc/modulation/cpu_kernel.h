// Arguments of the modulation loops that are its own.
#pragma once
#include "common/modulate_args.h"

namespace smis {

struct MomentsArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, P = 0;  // P: pixels
  Operand x;
  void *mean = nullptr, *var = nullptr;  // (N, C)
  double* partial = nullptr;             // row layout: (N, chunks, 2, C), means and squares
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

// Ranges in plane / row layout: apply (n, c, h) / (n, h); backward and moments (n, c) / (n, chunk),
// merged by (n, c); center (n, c) / (n, pixel).
SMIS_DECLARE_KERNEL(modulation_planes_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_rows_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_backward_planes_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(modulation_backward_rows_kernel, const ModulationArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(moments_planes_kernel, const MomentsArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(moments_rows_kernel, const MomentsArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(moments_merge_kernel, const MomentsArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(center_planes_kernel, const CenterArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(center_rows_kernel, const CenterArgs&, int64_t begin, int64_t end)
