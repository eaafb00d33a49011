// CPU implementation of a block's shortcut, a 1x1 conv of modulated features: scratch, threads. The
// loops: cpu_kernel.cpp.
#include <numeric>

#include "common/conv_host.h"
#include "common/rows.h"
#include "indexed_shortcut/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kPairs = 128;       // at a time: weights are read once for so many
constexpr int64_t kMostPixels = 512;  // of a block

Tensor indexed_shortcut(const Tensor& input, const Tensor& mean, const Tensor& rstd, const Tensor& index,
                        const Tensor& table, const Tensor& weight, int64_t groups, bool upsample) {
  ShortcutArgs a;
  Tensor w = weight;
  read_weight(a, weight, groups, false, w);
  const Tensor x = as_rows(input), ids = torch::stable::contiguous(index);
  const Tensor rows = torch::stable::contiguous(table);
  const Tensor m = torch::stable::contiguous(mean), r = torch::stable::contiguous(rstd);
  check_rows("index", ids, rows.size(0));
  a.N = x.size(0), a.H = x.size(2), a.W = x.size(3), a.upsample = upsample;
  const int64_t up = upsample ? 2 : 1;
  Tensor y = empty_nchw(a.N, groups * a.M, a.H * up, a.W * up, true, x);
  if (y.numel() == 0) return y;
  a.stream = y.numel() * int64_t(y.element_size()) >= kStreamBytes;
  a.batch_step = x.stride(0), a.pixel_step = x.stride(a.W > 1 ? 3 : 2);
  a.tiles = kPairs, a.stat_step = m.size(0) > 1 ? a.channels() : 0;
  a.x = x.const_data_ptr(), a.mean = m.const_data_ptr(), a.rstd = r.const_data_ptr();
  a.table = rows.const_data_ptr(), a.index = ids.const_data_ptr<int32_t>();
  a.y = y.mutable_data_ptr();
  ShortcutPlan plan;
  shortcut_plan_best()(a, &plan);
  Tensor u = scratch_like(x, groups * a.transformed());
  void* to = u.mutable_data_ptr();
  const auto pack = shortcut_weight_kernel_best();
  parallel(groups * plan.panels, 1, [&](int64_t begin, int64_t end) { pack(a, to, begin, end); });
  a.u = to;
  a.block = std::clamp<int64_t>(a.pixels() / (8 * torch::stable::get_num_threads()), kPairs / 4, kMostPixels);
  a.apart = std::max<int64_t>(a.blocks() * 5 / 8, 1);
  while (std::gcd(a.apart, a.blocks()) != 1) ++a.apart;
  const auto kernel = shortcut_kernel_best();
  parallel(a.blocks(), 1, [&](int64_t begin, int64_t end) {
    Tensor each = scratch_like(x, plan.scratch);
    kernel(a, begin, end, each.mutable_data_ptr());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("indexed_shortcut", TORCH_BOX(&indexed_shortcut));
}

}  // namespace smis
