// CPU implementations of the window-table ops: checks, scratch, threads. The loops: cpu_kernel.cpp.
#include "common/rows.h"
#include "window_table/cpu_kernel.h"

namespace smis {
namespace {

bool wide(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }

Tensor make(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
                              type, std::nullopt, like.device());
}

Tensor window_table(const Tensor& hidden, const Tensor& weight_gamma, const Tensor& bias_gamma,
                    const Tensor& weight_beta, const Tensor& bias_beta, const Tensor& windows,
                    int64_t groups, bool one_level, std::optional<Tensor> kinds,
                    std::optional<Tensor> ids) {
  const Tensor h = dense(hidden), wg = dense(weight_gamma), wb = dense(weight_beta),
               bg = dense(bias_gamma), bb = dense(bias_beta), w = dense(windows);
  const Tensor k = kinds.has_value() ? dense(*kinds) : w, n = ids.has_value() ? dense(*ids) : w;
  check_rows("windows", w, ids.has_value() ? n.size(1) : h.size(0));
  if (ids.has_value()) check_rows("own", n, h.size(0));
  WindowTableArgs a;
  a.wide = wide(h);
  a.V = h.size(0), a.D = h.size(1), a.C = wg.size(0), a.U = w.size(0), a.groups = groups;
  Tensor table = make(h, {a.U, 2 * a.C}, h.scalar_type());
  if (table.numel() == 0) return table;
  a.hidden = h.const_data_ptr();
  a.weight[0] = wg.const_data_ptr(), a.weight[1] = wb.const_data_ptr();
  a.bias[0] = bg.const_data_ptr(), a.bias[1] = bb.const_data_ptr();
  a.windows = w.const_data_ptr<int32_t>();
  a.table = table.mutable_data_ptr();
  a.one_level = one_level;
  if (kinds.has_value() && ids.has_value()) {
    a.kinds = k.const_data_ptr<int32_t>(), a.ids = n.const_data_ptr<int32_t>();
    a.sources = n.size(1);
  }
  int64_t blocks = 0, bytes = 0;
  window_table_plan_best()(a, &blocks, &bytes);
  const auto kernel = window_table_kernel_best();
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = make(h, {bytes}, ScalarType::Byte);  // one for each thread's range
    kernel(a, begin, end, scratch.mutable_data_ptr());
  });
  return table;
}

Tensor window_sum(const Tensor& rows, const Tensor& windows, std::optional<Tensor> bias, bool relu,
                  std::optional<Tensor> kinds, std::optional<Tensor> counts) {
  const Tensor r = dense(rows), w = dense(windows);
  check_rows("windows", w, r.size(0));
  Tensor b = bias.has_value() ? dense(*bias) : r;
  WindowSumArgs a;
  a.wide = wide(r), a.relu = relu;
  a.V = w.size(w.dim() - 2), a.C = r.size(2);
  const Tensor k = kinds.has_value() ? dense(*kinds) : w, n = counts.has_value() ? dense(*counts) : w;
  if (kinds.has_value()) a.groups = k.size(0), a.kinds = k.const_data_ptr<int32_t>();
  if (counts.has_value()) a.counts = n.const_data_ptr<int32_t>();
  Tensor out = make(r, {a.V, a.C}, r.scalar_type());
  a.rows = r.const_data_ptr();
  a.bias = bias.has_value() ? b.const_data_ptr() : nullptr;
  a.windows = w.const_data_ptr<int32_t>();
  a.out = out.mutable_data_ptr();
  const auto kernel = window_sum_kernel_best();
  parallel(a.V, 4096 / std::max<int64_t>(a.C, 1), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return out;
}

Tensor window_scatter(const Tensor& grad, const Tensor& windows, int64_t rows,
                      std::optional<Tensor> kinds) {
  const Tensor g = dense(grad), w = dense(windows);
  check_rows("windows", w, rows);
  WindowScatterArgs a;
  a.wide = wide(g);
  a.V = w.size(w.dim() - 2), a.C = g.size(1), a.R = rows;
  const Tensor k = kinds.has_value() ? dense(*kinds) : w;
  if (kinds.has_value()) a.groups = k.size(0), a.kinds = k.const_data_ptr<int32_t>();
  Tensor out = make(g, {rows, 9, a.C}, g.scalar_type());
  a.grad = g.const_data_ptr();
  a.windows = w.const_data_ptr<int32_t>();
  a.out = out.mutable_data_ptr();
  const auto kernel = window_scatter_kernel_best();
  parallel(a.C, 16, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("window_table", TORCH_BOX(&window_table));
  m.impl("window_sum", TORCH_BOX(&window_sum));
  m.impl("window_scatter", TORCH_BOX(&window_scatter));
}

}  // namespace smis
