// CPU implementations of the conditional attention: layout and threads. The loops: cpu_kernel.cpp.
#include "common/host.h"
#include "conditional_attention/cpu_kernel.h"

namespace smis {
namespace {

Tensor like(const Tensor& x, bool last) {
  return empty_nchw(x.size(0), x.size(1), x.size(2), x.size(3), last, x);
}

Tensor conditional_attention(const Tensor& input, const Tensor& logits, double negative_slope) {
  const bool last = channels_last(input);
  const Tensor x = reformatted(input, last), s = reformatted(logits, last);
  Tensor y = like(x, last);
  ConditionalAttentionArgs a;
  a.element = element_of(x, "conditional_attention");
  a.x = x.const_data_ptr(), a.logits = s.const_data_ptr(), a.y = y.mutable_data_ptr();
  a.slope = negative_slope;
  a.stream = y.numel() * int64_t(y.element_size()) >= kStreamBytes;
  const auto kernel = conditional_attention_kernel_best();
  parallel(y.numel(), kGrain, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return y;
}

std::tuple<Tensor, Tensor> conditional_attention_backward(const Tensor& grad, const Tensor& input,
                                                          const Tensor& logits,
                                                          double negative_slope) {
  const bool last = channels_last(input);
  const Tensor x = reformatted(input, last), s = reformatted(logits, last), g = reformatted(grad, last);
  Tensor dx = like(x, last), ds = like(x, last);
  ConditionalAttentionArgs a;
  a.element = element_of(x, "conditional_attention");
  a.x = x.const_data_ptr(), a.logits = s.const_data_ptr(), a.grad = g.const_data_ptr();
  a.dx = dx.mutable_data_ptr(), a.dlogits = ds.mutable_data_ptr();
  a.slope = negative_slope;
  const auto kernel = conditional_attention_backward_kernel_best();
  parallel(dx.numel(), kGrain, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dx, ds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("conditional_attention", TORCH_BOX(&conditional_attention));
  m.impl("conditional_attention_backward", TORCH_BOX(&conditional_attention_backward));
}

}  // namespace smis
