// CPU implementations of indexed modulation: layout, scratch, threads. The loops: cpu_kernel.cpp.
#include "common/modulate_host.h"
#include "common/rows.h"
#include "indexed_modulation/cpu_kernel.h"

namespace smis {
namespace {

// The tensor itself where it is contiguous: a call of the dispatcher costs a microsecond.
Tensor in_order(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The table as the layout wants it: rows [gamma | beta] of a window, or one row for each channel.
Tensor table_for(const Tensor& table, bool last) {
  return last ? in_order(table)
              : torch::stable::contiguous(torch::stable::transpose(table, 0, 1));
}

std::tuple<Tensor, Tensor> indexed_modulation_apply(
    const Tensor& input, const Tensor& mean, const Tensor& rstd, const Tensor& index,
    const Tensor& table, std::optional<Tensor> mean_s, std::optional<Tensor> rstd_s,
    std::optional<Tensor> table_s, double slope, double slope_s, bool upsample) {
  const bool last = channels_last(input), pair = table_s.has_value();
  const Tensor x = laid_out(input, last), ids = in_order(index);
  check_rows("index", ids, table.size(0));
  IndexedArgs a{arguments(x, upsample, pair), ids.const_data_ptr<int32_t>(), table.size(0)};
  const int64_t up = upsample ? 2 : 1;
  const Tensor g = table_for(table, last), gs = pair ? table_for(*table_s, last) : g;
  Tensor out = empty_nchw(a.N, a.C, a.H * up, a.W * up, last, x), out_s;
  a.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  a.branch[0] = branch(mean, rstd, slope);
  a.branch[0].table = g.const_data_ptr();
  a.branch[0].out = operand(out);
  if (pair) {
    out_s = empty_nchw(a.N, a.C, a.H * up, a.W * up, last, x);
    a.branch[1] = branch(mean_s.value_or(mean), rstd_s.value_or(rstd), slope_s);
    a.branch[1].table = gs.const_data_ptr();
    a.branch[1].out = operand(out_s);
  }
  const auto kernel = last ? indexed_rows_kernel_best() : indexed_planes_kernel_best();
  parallel(last ? a.N * a.H : a.N * a.C, grain(a.W * up * up * (last ? a.C : a.H)),
           [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {out, pair ? out_s : empty_of(x, {0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> indexed_modulation_backward(
    const Tensor& grad, const Tensor& output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const Tensor& index, const Tensor& table, std::optional<Tensor> grad_s,
    std::optional<Tensor> output_s, std::optional<Tensor> mean_s, std::optional<Tensor> rstd_s,
    std::optional<Tensor> table_s, double slope, double slope_s, bool upsample, bool sums) {
  const bool last = channels_last(input), pair = table_s.has_value();
  const Tensor x = laid_out(input, last), ids = in_order(index);
  check_rows("index", ids, table.size(0));
  IndexedArgs a{arguments(x, upsample, pair), ids.const_data_ptr<int32_t>(), table.size(0)};
  Tensor dx = empty_nchw(a.N, a.C, a.H, a.W, last, x);
  a.dx = operand(dx);
  std::vector<Tensor> kept, results;
  const auto fill = [&](ModulationBranch& br, const Tensor& m, const Tensor& r, const Tensor& g,
                        const Tensor& dy, const Tensor& y, double s) {
    br = branch(m, r, s);
    kept.push_back(table_for(g, last));
    br.table = kept.back().const_data_ptr();
    kept.push_back(laid_out(dy, last));
    br.grad = operand(kept.back());
    kept.push_back(laid_out(y, last));
    br.out = operand(kept.back());
    results.push_back(empty_of(x, {last ? a.rows : 2 * a.C, last ? 2 * a.C : a.rows},
                                  acc_type(x)));
    br.dtable = results.back().mutable_data_ptr();
  };
  fill(a.branch[0], mean, rstd, table, grad, output, slope);
  if (pair)
    fill(a.branch[1], mean_s.value_or(mean), rstd_s.value_or(rstd), *table_s, *grad_s, *output_s,
         slope_s);
  Tensor total = empty_sums(x, sums);
  if (sums) a.sums = total.mutable_data_ptr();
  a.sums_stride = a.N * a.C;
  const auto kernel = last ? indexed_backward_rows_kernel_best() : indexed_backward_planes_kernel_best();
  const int64_t line = 16;  // channels of a cache line: threads do not share one
  parallel((a.C + line - 1) / line, 1, [&](int64_t b, int64_t e) {
    kernel(a, b * line, std::min(a.C, e * line));
  });
  const auto by_rows = [&](const Tensor& t) {
    return last ? t : torch::stable::contiguous(torch::stable::transpose(t, 0, 1));
  };
  return {dx, by_rows(results[0]),
          pair ? by_rows(results[1]) : empty_of(x, {0}, acc_type(x)), total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("indexed_modulation_apply", TORCH_BOX(&indexed_modulation_apply));
  m.impl("indexed_modulation_backward", TORCH_BOX(&indexed_modulation_backward));
}

}  // namespace smis
