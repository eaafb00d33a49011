// Arguments of the spatially varying convolution. "Plane" layout is NCHW with dense planes, "row"
// layout is NHWC with dense channels; weights are (N, G * K * K, OH, OW), channel-major then tap.
#pragma once
#include "common/operand.h"

namespace smis {

struct VaryingConvArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, G = 0, H = 0, W = 0, OH = 0, OW = 0;
  int64_t K = 3, stride = 1, padding = 1, dilation = 1;
  Operand x, w, y;  // whichever is the result is written; y is the gradient in the backward
  bool stream = false;

  int64_t taps() const { return K * K; }
  int64_t reach() const { return (K - 1) * dilation; }
  int64_t per_group() const { return C / G; }
  // Plane layout: output rows that one item takes, and items per (image, group).
  int64_t rows() const { return OW >= 2048 ? 1 : OW > 0 ? (2048 / OW < OH ? 2048 / OW : OH) : OH; }
  int64_t blocks() const { return (OH + rows() - 1) / rows(); }
  // Row layout, gradient of the input: input rows of one band.
  int64_t band() const {
    const int64_t wanted = (int64_t(1) << 18) / (W * C > 0 ? W * C : 1), least = reach() + 1;
    const int64_t band = wanted > least ? wanted : least;
    return band < H ? band : H;
  }
};

}  // namespace smis

// `scratch` holds what the _scratch function of the same kernel says, in bytes.
SMIS_DECLARE_KERNEL(varying_conv_planes_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(varying_conv_rows_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(varying_conv_grad_weight_planes_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(varying_conv_grad_weight_rows_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(varying_conv_grad_input_planes_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(varying_conv_grad_input_rows_kernel, const VaryingConvArgs&, int64_t begin, int64_t end, void* scratch)
