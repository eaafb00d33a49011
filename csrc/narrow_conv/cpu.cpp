// CPU implementation of the convolution to few outputs. The loops: cpu_kernel.cpp.
#include "common/conv_host.h"
#include "narrow_conv/cpu_kernel.h"

namespace smis {
namespace {

Tensor narrow_conv(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t padding) {
  const auto last = torch::headeronly::MemoryFormat::ChannelsLast;
  const Tensor x = as_rows(input), w = torch::stable::contiguous(weight, last);
  const Tensor b = bias.has_value() ? torch::stable::contiguous(*bias) : w;
  NarrowArgs a;
  a.wide = x.scalar_type() == ScalarType::Double;
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3), a.M = w.size(0);
  a.side = w.size(2), a.padding = padding;
  Tensor y = empty_nchw(a.N, a.M, a.height(), a.width(), true, x);
  if (y.numel() == 0) return y;
  a.batch_step = x.stride(0), a.pixel_step = x.stride(x.size(3) > 1 ? 3 : 2);
  a.x = x.const_data_ptr(), a.weight = w.const_data_ptr();
  a.bias = bias.has_value() ? b.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  const auto kernel = narrow_conv_kernel_best();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (a.width() * a.C));
  parallel(a.N * a.height(), grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) { m.impl("narrow_conv", TORCH_BOX(&narrow_conv)); }

}  // namespace smis
