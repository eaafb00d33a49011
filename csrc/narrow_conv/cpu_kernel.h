// Arguments of a convolution to at most four outputs, features (N, H, W, C), weights (M, side, side, C).
//
// Registers lie along the channels: a few pixels' sums of every output stay in them over all taps, and a
// vector of the input serves all outputs. Where registers lie along the outputs, most lanes are idle.
#pragma once
#include "common/isa.h"

namespace smis {

struct NarrowArgs {
  static constexpr int64_t kMost = 4;
  bool wide = false;                       // fp64, else fp32
  int64_t N = 0, C = 0, H = 0, W = 0, M = 0;
  int64_t side = 3, padding = 0;
  int64_t batch_step = 0, pixel_step = 0;  // of x, in elements
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;              // (M) or null
  void* y = nullptr;                       // (N, height, width, M)

  int64_t height() const { return H + 2 * padding - side + 1; }
  int64_t width() const { return W + 2 * padding - side + 1; }
};

}  // namespace smis

// Items: (image, row of the output).
SMIS_DECLARE_KERNEL(narrow_conv_kernel, const NarrowArgs&, int64_t begin, int64_t end)
