// CPU implementations of the spatially varying convolution: layout, scratch, threads. The loops:
// cpu_kernel.cpp.
#include "common/host.h"
#include "spatially_varying_conv/scratch.h"

namespace smis {
namespace {

using Kernel = void (*)(const VaryingConvArgs&, int64_t, int64_t, void*);

VaryingConvArgs arguments(const Tensor& x, int64_t groups, const Tensor& y, int64_t kernel_size,
                          int64_t stride, int64_t padding, int64_t dilation) {
  VaryingConvArgs a;
  a.element = element_of(x, "spatially_varying_conv");
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.G = groups, a.OH = y.size(2), a.OW = y.size(3);
  a.K = kernel_size, a.stride = stride, a.padding = padding, a.dilation = dilation;
  return a;
}

void run(Kernel kernel, const VaryingConvArgs& a, const Tensor& like, int64_t items, int64_t each,
         int64_t elements) {
  parallel(items, grain(each), [&](int64_t begin, int64_t end) {
    Tensor scratch = empty_of(like, {elements}, acc_type(like));
    kernel(a, begin, end, scratch.mutable_data_ptr());
  });
}

// The weights, by far the largest operand, decide the layout; the input follows.
Tensor varying_conv(const Tensor& input, const Tensor& weight, int64_t kernel_size, int64_t stride,
                    int64_t padding, int64_t dilation) {
  const bool last = channels_last(weight), wanted = channels_last(input);
  const Tensor x = laid_out(input, last), w = laid_out(weight, last);
  const int64_t groups = w.size(1) / (kernel_size * kernel_size);
  Tensor y = empty_nchw(x.size(0), x.size(1), w.size(2), w.size(3), last, x);
  if (y.numel() == 0) return last == wanted ? y : reformatted(y, wanted);
  VaryingConvArgs a = arguments(x, groups, y, kernel_size, stride, padding, dilation);
  a.x = operand(x), a.w = operand(w), a.y = operand(y);
  a.stream = last == wanted && y.numel() * int64_t(y.element_size()) >= kStreamBytes;
  if (last)
    run(varying_conv_rows_kernel_best(), a, x, a.N * a.OH, a.OW * a.C * a.taps(), rows_scratch(a));
  else
    run(varying_conv_planes_kernel_best(), a, x, a.N * a.G * a.blocks(),
        a.rows() * a.OW * a.taps() * a.per_group(), planes_scratch(a));
  return last == wanted ? y : reformatted(y, wanted);
}

Tensor varying_conv_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                int64_t kernel_size, int64_t stride, int64_t padding,
                                int64_t dilation) {
  const bool last = channels_last(weight);
  const Tensor x = laid_out(input, last), y = laid_out(grad, last);
  Tensor w = empty_nchw(weight.size(0), weight.size(1), weight.size(2), weight.size(3), last, x);
  if (w.numel() == 0) return w;
  const int64_t groups = w.size(1) / (kernel_size * kernel_size);
  VaryingConvArgs a = arguments(x, groups, y, kernel_size, stride, padding, dilation);
  a.x = operand(x), a.w = operand(w), a.y = operand(y);
  a.stream = w.numel() * int64_t(w.element_size()) >= kStreamBytes;
  if (last)
    run(varying_conv_grad_weight_rows_kernel_best(), a, x, a.N * a.OH, a.OW * a.C * a.taps(),
        rows_scratch(a));
  else
    run(varying_conv_grad_weight_planes_kernel_best(), a, x, a.N * a.G * a.blocks(),
        a.rows() * a.OW * a.taps() * a.per_group(), planes_scratch(a));
  return w;
}

Tensor varying_conv_grad_input(const Tensor& grad, const Tensor& weight, int64_t height,
                               int64_t width, bool wanted, int64_t kernel_size, int64_t stride,
                               int64_t padding, int64_t dilation) {
  const bool last = channels_last(weight);
  const Tensor w = laid_out(weight, last), y = laid_out(grad, last);
  Tensor x = empty_nchw(grad.size(0), grad.size(1), height, width, last, y);
  if (y.numel() == 0) {
    torch::stable::fill_(x, 0.0);
    return last == wanted ? x : reformatted(x, wanted);
  }
  const int64_t groups = w.size(1) / (kernel_size * kernel_size);
  VaryingConvArgs a = arguments(x, groups, y, kernel_size, stride, padding, dilation);
  a.x = operand(x), a.w = operand(w), a.y = operand(y);
  const int64_t height_of_band = std::max<int64_t>(a.band(), 1);
  if (last)
    run(varying_conv_grad_input_rows_kernel_best(), a, y,
        a.N * ((a.H + height_of_band - 1) / height_of_band),
        height_of_band * a.W * a.C * a.taps(), grad_input_rows_scratch(a));
  else
    run(varying_conv_grad_input_planes_kernel_best(), a, y, a.N * a.C, a.OH * a.OW * a.taps(),
        grad_input_planes_scratch(a));
  return last == wanted ? x : reformatted(x, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("varying_conv", TORCH_BOX(&varying_conv));
  m.impl("varying_conv_grad_weight", TORCH_BOX(&varying_conv_grad_weight));
  m.impl("varying_conv_grad_input", TORCH_BOX(&varying_conv_grad_input));
}

}  // namespace smis
