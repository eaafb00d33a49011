// CPU implementations of the spectrally normalised weight: layouts and threads. The loops:
// cpu_kernel.cpp.
#include "common/host.h"
#include "spectral_weight/cpu_kernel.h"

namespace smis {
namespace {

double number(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

SpectralWeightArgs arguments(const Tensor& weight, bool last) {
  SpectralWeightArgs a;
  a.element = element_of(weight, "spectral_weight");
  a.weight = weight.const_data_ptr();
  a.taps = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
  a.inner = weight.numel() / std::max<int64_t>(weight.size(0) * a.taps, 1);
  a.last = last && a.taps > 1 && a.inner > 1;
  return a;
}

Tensor spectral_weight(const Tensor& weight, const Tensor& sigma, bool last) {
  const Tensor w = torch::stable::contiguous(weight);
  last = last && w.dim() == 4;
  Tensor y = last ? empty_nchw(w.size(0), w.size(1), w.size(2), w.size(3), true, w)
                  : torch::stable::empty_like(w);
  SpectralWeightArgs a = arguments(w, last);
  a.out = y.mutable_data_ptr(), a.sigma = number(sigma);
  const auto kernel = spectral_weight_kernel_best();
  parallel(w.size(0), grain(a.inner * a.taps), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return y;
}

Tensor spectral_weight_backward(const Tensor& grad, const Tensor& weight, const Tensor& u,
                                const Tensor& v, const Tensor& sigma) {
  const Tensor w = torch::stable::contiguous(weight), left = torch::stable::contiguous(u),
               right = torch::stable::contiguous(v);
  const bool last = w.dim() == 4 && channels_last(grad);
  const Tensor g = torch::stable::contiguous(
      grad, last ? torch::headeronly::MemoryFormat::ChannelsLast
                 : torch::headeronly::MemoryFormat::Contiguous);
  Tensor d = torch::stable::empty_like(w);
  SpectralWeightArgs a = arguments(w, last);
  a.grad = g.const_data_ptr(), a.d_weight = d.mutable_data_ptr();
  a.u = left.const_data_ptr(), a.v = right.const_data_ptr();
  std::vector<double> dots(size_t(w.size(0)));
  a.dots = dots.data();
  const int64_t rows = grain(a.inner * a.taps);
  const auto sums = spectral_weight_dots_kernel_best();
  parallel(w.size(0), rows, [&](int64_t b, int64_t e) { sums(a, b, e); });
  double total = 0;
  for (double dot : dots) total += dot;  // in one order, whatever the threads
  a.sigma = number(sigma), a.outer = total / (a.sigma * a.sigma);
  const auto kernel = spectral_weight_backward_kernel_best();
  parallel(w.size(0), rows, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return d;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("spectral_weight", TORCH_BOX(&spectral_weight));
  m.impl("spectral_weight_backward", TORCH_BOX(&spectral_weight_backward));
}

}  // namespace smis
