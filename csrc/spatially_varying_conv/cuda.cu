// CUDA kernels of the spatially varying convolution. Bound by memory: every weight is read once,
// neighbouring threads read neighbouring weights, and the input comes from the caches.
#include "common/cuda.h"
#include "spatially_varying_conv/cpu_kernel.h"

namespace smis::cuda {
namespace {

// Where thread `i` of an (n, channels, h, w) grid works: channels or columns vary fastest.
struct Place {
  int64_t n, c, y, x;
  __device__ Place(int64_t i, int64_t channels, int64_t h, int64_t w, bool last) {
    if (last) c = i % channels, i /= channels;
    x = i % w, i /= w;
    y = i % h, i /= h;
    if (!last) c = i % channels, i /= channels;
    n = i;
  }
};

template <class T, int K> __global__ void forward_kernel(VaryingConvArgs a, bool last) {
  const int64_t total = a.N * a.C * a.OH * a.OW, each = a.C / a.G;
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const Place at_(i, a.C, a.OH, a.OW, last);
    const int64_t pixel = at_.y * a.OW + at_.x, g = at_.c / each;
    Acc<T> sum = 0;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const int64_t y = at_.y * a.stride - a.padding + tap / K * a.dilation;
      const int64_t x = at_.x * a.stride - a.padding + tap % K * a.dilation;
      const bool inside = y >= 0 && y < a.H && x >= 0 && x < a.W;  // outside: NaN weights survive
      const Acc<T> value = inside ? load(*at<const T>(a.x, at_.n, at_.c, y * a.W + x)) : Acc<T>(0);
      sum += load(*at<const T>(a.w, at_.n, g * K * K + tap, pixel)) * value;
    }
    *at<T>(a.y, at_.n, at_.c, pixel) = rounded<T>(sum);
  }
}

template <class T, int K> __global__ void grad_weight_kernel(VaryingConvArgs a, bool last) {
  const int64_t total = a.N * a.G * a.OH * a.OW, each = a.C / a.G;
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const Place at_(i, a.G, a.OH, a.OW, last);
    const int64_t pixel = at_.y * a.OW + at_.x;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const int64_t y = at_.y * a.stride - a.padding + tap / K * a.dilation;
      const int64_t x = at_.x * a.stride - a.padding + tap % K * a.dilation;
      const bool inside = y >= 0 && y < a.H && x >= 0 && x < a.W;
      Acc<T> sum = 0;
      for (int64_t c = at_.c * each; c < (at_.c + 1) * each; ++c) {
        const Acc<T> value = inside ? load(*at<const T>(a.x, at_.n, c, y * a.W + x)) : Acc<T>(0);
        sum += load(*at<const T>(a.y, at_.n, c, pixel)) * value;
      }
      *at<T>(a.w, at_.n, at_.c * K * K + tap, pixel) = rounded<T>(sum);
    }
  }
}

template <class T, int K> __global__ void grad_input_kernel(VaryingConvArgs a, bool last) {
  const int64_t total = a.N * a.C * a.H * a.W, each = a.C / a.G;
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const Place at_(i, a.C, a.H, a.W, last);
    const int64_t g = at_.c / each;
    Acc<T> sum = 0;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const int64_t y = at_.y + a.padding - tap / K * a.dilation;
      const int64_t x = at_.x + a.padding - tap % K * a.dilation;
      if (y < 0 || x < 0 || y % a.stride || x % a.stride) continue;
      if (y / a.stride >= a.OH || x / a.stride >= a.OW) continue;
      const int64_t pixel = y / a.stride * a.OW + x / a.stride;
      sum += load(*at<const T>(a.w, at_.n, g * K * K + tap, pixel)) *
             load(*at<const T>(a.y, at_.n, at_.c, pixel));
    }
    *at<T>(a.x, at_.n, at_.c, at_.y * a.W + at_.x) = rounded<T>(sum);
  }
}

Tensor dense(const Tensor& t) {
  return rows_dense(t) || planes_dense(t) ? t : torch::stable::contiguous(t);
}

VaryingConvArgs arguments(const Tensor& x, const Tensor& w, const Tensor& y, int64_t kernel_size,
                          int64_t stride, int64_t padding, int64_t dilation) {
  VaryingConvArgs a;
  a.element = element_of(x, "spatially_varying_conv");
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.K = kernel_size, a.stride = stride, a.padding = padding, a.dilation = dilation;
  a.G = w.size(1) / a.taps(), a.OH = y.size(2), a.OW = y.size(3);
  a.x = operand(x), a.w = operand(w), a.y = operand(y);
  return a;
}

// Calls fn(T{}, integral constant K).
template <class F> void with_kernel(const VaryingConvArgs& a, const F& fn) {
  with_element(a.element, [&](auto t) {
    if (a.K == 1) fn(t, std::integral_constant<int, 1>{});
    else if (a.K == 3) fn(t, std::integral_constant<int, 3>{});
    else fn(t, std::integral_constant<int, 5>{});
  });
}

Tensor varying_conv(const Tensor& input, const Tensor& weight, int64_t kernel_size, int64_t stride,
                    int64_t padding, int64_t dilation) {
  const Launch launch(input, "spatially_varying_conv2d");
  const Tensor x = dense(input), w = dense(weight);
  Tensor y = empty_nchw(x.size(0), x.size(1), w.size(2), w.size(3), channels_last(input), x);
  if (y.numel() == 0) return y;
  const VaryingConvArgs a = arguments(x, w, y, kernel_size, stride, padding, dilation);
  with_kernel(a, [&](auto t, auto k) {
    forward_kernel<decltype(t), k()>
        <<<grid(y.numel()), kThreads, 0, launch.stream>>>(a, channels_last(w));
    launch.check();
  });
  return y;
}

Tensor varying_conv_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                int64_t kernel_size, int64_t stride, int64_t padding,
                                int64_t dilation) {
  const Launch launch(grad, "spatially_varying_conv2d");
  const Tensor x = dense(input), y = dense(grad);
  Tensor w = empty_nchw(weight.size(0), weight.size(1), weight.size(2), weight.size(3),
                        channels_last(weight), x);
  if (w.numel() == 0) return w;
  const VaryingConvArgs a = arguments(x, w, y, kernel_size, stride, padding, dilation);
  with_kernel(a, [&](auto t, auto k) {
    grad_weight_kernel<decltype(t), k()>
        <<<grid(w.numel() / (k() * k())), kThreads, 0, launch.stream>>>(a, channels_last(w));
    launch.check();
  });
  return w;
}

Tensor varying_conv_grad_input(const Tensor& grad, const Tensor& weight, int64_t height,
                               int64_t width, bool last, int64_t kernel_size, int64_t stride,
                               int64_t padding, int64_t dilation) {
  const Launch launch(grad, "spatially_varying_conv2d");
  const Tensor w = dense(weight), y = dense(grad);
  Tensor x = empty_nchw(grad.size(0), grad.size(1), height, width, last, y);
  if (x.numel() == 0) return x;
  const VaryingConvArgs a = arguments(x, w, y, kernel_size, stride, padding, dilation);
  with_kernel(a, [&](auto t, auto k) {
    grad_input_kernel<decltype(t), k()>
        <<<grid(x.numel()), kThreads, 0, launch.stream>>>(a, channels_last(w));
    launch.check();
  });
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("varying_conv", TORCH_BOX(&varying_conv));
  m.impl("varying_conv_grad_weight", TORCH_BOX(&varying_conv_grad_weight));
  m.impl("varying_conv_grad_input", TORCH_BOX(&varying_conv_grad_input));
}

}  // namespace
}  // namespace smis::cuda
