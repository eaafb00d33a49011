// Arguments of the spectrally normalised weight: rows of `inner` channels by `taps` kernel taps.
#pragma once
#include "common/isa.h"

namespace smis {

// `weight`, `v` and `d_weight` are ordered (row, channel, tap); `out` and `grad` the same, or
// (row, tap, channel), channels-last, where `last` is set.
struct SpectralWeightArgs {
  Element element = Element::f32;  // f32 or f64
  const void *weight = nullptr, *grad = nullptr, *u = nullptr, *v = nullptr;
  void *out = nullptr, *d_weight = nullptr;
  double* dots = nullptr;  // of each row: <grad, weight>
  int64_t inner = 0, taps = 0;
  double sigma = 1, outer = 0;  // out = weight / sigma; d_weight = grad / sigma - outer * u v^T
  bool last = false;
};

}  // namespace smis

SMIS_DECLARE_KERNEL(spectral_weight_kernel, const SpectralWeightArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(spectral_weight_dots_kernel, const SpectralWeightArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(spectral_weight_backward_kernel, const SpectralWeightArgs&, int64_t begin, int64_t end)
