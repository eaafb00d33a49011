// CPU implementations of the modulation ops: layout, scratch, threads. The loops: cpu_kernel.cpp.
#include <cmath>

#include "common/modulate_host.h"
#include "modulation/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kPartialPixels = 512;  // row layout: pixels behind one row of partial sums

std::tuple<Tensor, Tensor> channel_moments(const Tensor& input) {
  const int64_t N = input.size(0), C = input.size(1), P = input.size(2) * input.size(3);
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  Tensor mean = empty_of(x, {N, C}, acc_type(x)), var = empty_of(x, {N, C}, acc_type(x));
  MomentsArgs a;
  a.element = element_of(x, "channel_moments");
  a.N = N, a.C = C, a.P = P;
  a.x = operand(x);
  a.mean = mean.mutable_data_ptr();
  a.var = var.mutable_data_ptr();
  if (!last) {
    const auto kernel = moments_planes_kernel_best();
    parallel(N * C, grain(P), [&](int64_t b, int64_t e) { kernel(a, b, e); });
    return {mean, var};
  }
  a.chunk = kPartialPixels;
  const int64_t chunks = (P + a.chunk - 1) / a.chunk;
  Tensor partial = empty_of(x, {N, chunks, 2, C}, ScalarType::Double);
  a.partial = partial.mutable_data_ptr<double>();
  const auto kernel = moments_rows_kernel_best();
  parallel(N * chunks, grain(a.chunk * C), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  const auto merge = moments_merge_kernel_best();
  parallel(N * C, grain(chunks * 2), [&](int64_t b, int64_t e) { merge(a, b, e); });
  return {mean, var};
}

template <class T>
void fix(const Tensor& mean, const Tensor& var, double eps, Tensor& out_mean, Tensor& out_rstd) {
  const T *m = mean.const_data_ptr<T>(), *v = var.const_data_ptr<T>();
  T *to = out_mean.mutable_data_ptr<T>(), *rstd = out_rstd.mutable_data_ptr<T>();
  const int64_t channels = mean.size(0), step = mean.stride(0), step_v = var.stride(0);
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = m[c * step];
    rstd[c] = T(1) / std::sqrt(v[c * step_v] + T(eps));
  }
}

std::tuple<Tensor, Tensor> fixed_statistics(const Tensor& mean, const Tensor& var, double eps) {
  const ScalarType type = mean.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    refuse("running_mean: expected dtype float32 or float64; cast it first");
  if (var.scalar_type() != type || mean.dim() != 1 || var.dim() != 1 || var.size(0) != mean.size(0))
    refuse("running_var: expected the shape (C,) and dtype of running_mean, got another");
  Tensor center = empty_of(mean, {1, mean.size(0)}, type), rstd = empty_of(mean, {1, mean.size(0)}, type);
  if (type == ScalarType::Double)
    fix<double>(mean, var, eps, center, rstd);
  else
    fix<float>(mean, var, eps, center, rstd);
  return {center, rstd};
}

std::tuple<Tensor, Tensor> modulation_apply(
    const Tensor& input, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
    const Tensor& beta, std::optional<Tensor> mean_s, std::optional<Tensor> rstd_s,
    std::optional<Tensor> gamma_s, std::optional<Tensor> beta_s, double slope, double slope_s,
    bool upsample) {
  const bool last = channels_last(input), pair = gamma_s.has_value();
  const Tensor x = laid_out(input, last), g = laid_out(gamma, last), b = laid_out(beta, last);
  ModulationArgs a = arguments(x, upsample, pair);
  const int64_t up = upsample ? 2 : 1;
  Tensor out = empty_nchw(a.N, a.C, a.H * up, a.W * up, last, x);
  a.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  a.branch[0] = branch(mean, rstd, slope);
  a.branch[0].gamma = operand(g);
  a.branch[0].beta = operand(b);
  a.branch[0].out = operand(out);
  Tensor out_s, gs, bs;
  if (pair) {
    gs = laid_out(*gamma_s, last), bs = laid_out(*beta_s, last);
    out_s = empty_nchw(a.N, a.C, a.H * up, a.W * up, last, x);
    a.branch[1] = branch(mean_s.value_or(mean), rstd_s.value_or(rstd), slope_s);
    a.branch[1].gamma = operand(gs);
    a.branch[1].beta = operand(bs);
    a.branch[1].out = operand(out_s);
  }
  const auto kernel = last ? modulation_rows_kernel_best() : modulation_planes_kernel_best();
  const int64_t items = last ? a.N * a.H : a.N * a.C * a.H;
  parallel(items, grain(a.W * up * up * (last ? a.C : 1)),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {out, pair ? out_s : empty_of(x, {0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulation_backward(
    const Tensor& grad, const Tensor& output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const Tensor& gamma, std::optional<Tensor> grad_s,
    std::optional<Tensor> output_s, std::optional<Tensor> mean_s, std::optional<Tensor> rstd_s,
    std::optional<Tensor> gamma_s, double slope, double slope_s, bool upsample, bool sums) {
  const bool last = channels_last(input), pair = gamma_s.has_value();
  const Tensor x = laid_out(input, last);
  ModulationArgs a = arguments(x, upsample, pair);
  const int64_t up = upsample ? 2 : 1;
  Tensor dx = empty_nchw(a.N, a.C, a.H, a.W, last, x);
  a.dx = operand(dx);
  std::vector<Tensor> kept, results;
  const auto fill = [&](ModulationBranch& br, const Tensor& m, const Tensor& r, const Tensor& g,
                        const Tensor& dy, const Tensor& y, double s) {
    kept.push_back(laid_out(g, last));
    br = branch(m, r, s);
    br.gamma = operand(kept.back());
    kept.push_back(laid_out(dy, last));
    br.grad = operand(kept.back());
    kept.push_back(laid_out(y, last));
    br.out = operand(kept.back());
    for (Operand* o : {&br.dgamma, &br.dbeta}) {
      results.push_back(empty_nchw(a.N, a.C, a.H * up, a.W * up, last, x));
      *o = operand(results.back());
    }
  };
  fill(a.branch[0], mean, rstd, gamma, grad, output, slope);
  if (pair)
    fill(a.branch[1], mean_s.value_or(mean), rstd_s.value_or(rstd), *gamma_s, *grad_s, *output_s,
         slope_s);
  else
    for (int i = 0; i < 2; ++i) results.push_back(empty_of(x, {0}, x.scalar_type()));

  Tensor total = empty_sums(x, sums);
  if (!last) {
    if (sums) a.sums = total.mutable_data_ptr();
    a.sums_stride = a.N * a.C;
    const auto kernel = modulation_backward_planes_kernel_best();
    parallel(a.N * a.C, grain(a.H * a.W * up * up),
             [&](int64_t b, int64_t e) { kernel(a, b, e); });
  } else {
    a.chunk = std::max<int64_t>(1, kPartialPixels / a.W);
    const int64_t chunks = (a.H + a.chunk - 1) / a.chunk;
    Tensor partial;
    if (sums) {
      partial = empty_of(x, {a.N, chunks, 2, a.C}, acc_type(x));
      a.sums = partial.mutable_data_ptr();
    }
    const auto kernel = modulation_backward_rows_kernel_best();
    parallel(a.N * chunks, grain(a.chunk * a.W * a.C * up * up),
             [&](int64_t b, int64_t e) { kernel(a, b, e); });
    if (sums) sum_chunks(partial, total);
  }
  return {dx, results[0], results[1], results[2], results[3], total};
}

Tensor modulation_center(const Tensor& grad, const Tensor& input, const Tensor& mean,
                         const Tensor& rstd, const Tensor& shift, const Tensor& scale) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last), g = laid_out(grad, last);
  CenterArgs a;
  a.element = element_of(x, "modulation_center");
  a.N = x.size(0), a.C = x.size(1), a.P = x.size(2) * x.size(3);
  Tensor dx = empty_nchw(a.N, a.C, x.size(2), x.size(3), last, x);
  a.grad = operand(g), a.x = operand(x), a.dx = operand(dx);
  a.mean = mean.const_data_ptr(), a.rstd = rstd.const_data_ptr();
  a.shift = shift.const_data_ptr(), a.scale = scale.const_data_ptr();
  a.stat_n = mean.size(0) > 1;
  const auto kernel = last ? center_rows_kernel_best() : center_planes_kernel_best();
  parallel(a.N * (last ? a.P : a.C), grain(last ? a.C : a.P),
           [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("fixed_statistics", TORCH_BOX(&fixed_statistics));
  m.impl("modulation_apply", TORCH_BOX(&modulation_apply));
  m.impl("modulation_backward", TORCH_BOX(&modulation_backward));
  m.impl("modulation_center", TORCH_BOX(&modulation_center));
}

}  // namespace smis
