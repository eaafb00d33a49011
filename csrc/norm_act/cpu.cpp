// norm_act on the CPU: layout, scratch, threads. The loops: cpu_kernel.cpp.
#include "common/host.h"
#include "norm_act/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kPixels = 512;  // row layout: pixels of a task, and behind one row of partial sums

NormActArgs arguments(const Tensor& x, const Tensor& mean, const Tensor& rstd, double slope) {
  NormActArgs a;
  a.element = element_of(x, "norm_act");
  a.N = x.size(0), a.C = x.size(1), a.P = x.size(2) * x.size(3);
  a.x = operand(x);
  a.mean = mean.const_data_ptr();
  a.rstd = rstd.const_data_ptr();
  a.stat_n = mean.size(0) > 1;
  a.slope = slope;
  a.chunk = kPixels;
  return a;
}

Tensor norm_act(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                std::optional<Tensor> residual, double slope) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  NormActArgs a = arguments(x, mean, rstd, slope);
  Tensor out = empty_nchw(a.N, a.C, x.size(2), x.size(3), last, x);
  Tensor kept;
  if (residual.has_value()) {
    kept = laid_out(*residual, last);
    a.residual = operand(kept);
  }
  a.out = operand(out);
  a.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  const auto kernel = last ? norm_act_rows_kernel_best() : norm_act_planes_kernel_best();
  const int64_t items = last ? a.N * ((a.P + a.chunk - 1) / a.chunk) : a.N * a.C;
  parallel(items, grain(last ? a.chunk * a.C : a.P),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> norm_act_backward(const Tensor& grad, const Tensor& input,
                                             const Tensor& mean, const Tensor& rstd, double slope,
                                             bool sums) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last), dy = laid_out(grad, last);
  NormActArgs a = arguments(x, mean, rstd, slope);
  Tensor dx = empty_nchw(a.N, a.C, x.size(2), x.size(3), last, x);
  Tensor total = empty_sums(x, sums);
  a.grad = operand(dy);
  a.out = operand(dx);
  if (!last) {
    if (sums) a.sums = total.mutable_data_ptr();
    a.sums_stride = a.N * a.C;
    const auto kernel = norm_act_backward_planes_kernel_best();
    parallel(a.N * a.C, grain(a.P), [&](int64_t b, int64_t e) { kernel(a, b, e); });
    return {dx, total};
  }
  const int64_t chunks = (a.P + a.chunk - 1) / a.chunk;
  Tensor partial;
  if (sums) {
    partial = empty_of(x, {a.N, chunks, 2, a.C}, acc_type(x));
    a.sums = partial.mutable_data_ptr();
  }
  const auto kernel = norm_act_backward_rows_kernel_best();
  parallel(a.N * chunks, grain(a.chunk * a.C), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  if (sums) sum_chunks(partial, total);
  return {dx, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace smis
