// CPU implementation of the 3x3 convolution by Winograd's F(2x2, 3x3) and F(4x4, 3x3): scratch, threads.
// The loops: cpu_kernel.cpp.
#include "common/tensor.h"
#include "winograd_conv/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kMostTiles = 128, kRows = 8;
constexpr int64_t kCache = 1800 << 10;  // bytes that stay in a core's second cache
constexpr int64_t kMostStreamed = 64;   // tiles; each panel reads them again (choice.py: MOST_STREAMED)

// Tiles of a block, in blocks that the threads share evenly: where the kernels fit the cache, as many
// as fit beside them; else as many as pay for reading the kernels from further away.
int64_t tiles_of_block(const WinogradArgs& a) {
  const int64_t threads = torch::stable::get_num_threads(), all = a.all_tiles();
  const int64_t bytes = a.frequencies() * (a.wide ? 8 : 4);
  const int64_t beside = (kCache - bytes * a.K * a.M) / (bytes * (a.K + a.M));
  const int64_t most = beside >= 2 * kRows ? std::min<int64_t>(beside, kMostTiles) : kMostTiles;
  int64_t blocks = (all + most - 1) / most;
  while (a.groups * blocks % threads != 0 && a.groups * blocks < 8 * threads) ++blocks;
  return ((all + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
}

Tensor as_rows(const Tensor& t) {
  const bool dense = t.stride(1) == 1 && rows_dense(t) && t.size(2) * t.size(3) > 1;
  return dense ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor scratch_like(const Tensor& like, int64_t count) {
  return torch::stable::empty({count}, like.scalar_type(), std::nullopt, like.device());
}

// The kernels' side of the arguments; `w` is the weight as they read it.
WinogradArgs of_weight(const Tensor& weight, int64_t groups, int64_t tile, bool flipped, Tensor& w) {
  const bool last = !flipped && weight.size(1) > 1 && weight.stride(1) == 1 && weight.stride(3) == weight.size(1) &&
                    weight.stride(2) == 3 * weight.size(1) && weight.stride(0) == 9 * weight.size(1);
  w = last ? weight : torch::stable::contiguous(weight);
  WinogradArgs a;
  a.wide = w.scalar_type() == ScalarType::Double;
  a.tile = tile;
  a.groups = groups, a.K = w.size(1), a.M = w.size(0) / groups;
  a.flipped = flipped;
  if (flipped) std::swap(a.K, a.M);
  if (flipped) a.k_step = 9 * a.M;
  else a.out_step = 9 * a.K;
  if (last) a.k_step = 1, a.tap_step = a.K;
  a.weight = w.const_data_ptr();
  return a;
}

WinogradPlan plan_of(const WinogradArgs& a) {
  WinogradPlan plan;
  winograd_plan_best()(a, &plan);
  return plan;
}

Tensor transform(const WinogradArgs& a, const Tensor& like) {
  Tensor u = scratch_like(like, a.groups * a.transformed());
  void* to = u.mutable_data_ptr();
  const auto kernel = winograd_weight_kernel_best();
  parallel(a.groups * plan_of(a).panels, 1, [&](int64_t begin, int64_t end) { kernel(a, to, begin, end); });
  return u;
}

// Whether transformed kernels would leave the cache before they are read, and all tiles stay there.
bool streams(const WinogradArgs& a) {
  const int64_t bytes = a.frequencies() * a.K * a.M * (a.wide ? 8 : 4);
  const int64_t blocks = (a.all_tiles() + kRows - 1) / kRows;  // what threads would share else
  return bytes > kCache && a.all_tiles() <= kMostStreamed &&
         a.groups * plan_of(a).panels >= std::min<int64_t>(torch::stable::get_num_threads(), blocks);
}

void conv_streamed(WinogradArgs a, const Tensor& like) {
  a.tiles = (a.all_tiles() + kRows - 1) / kRows * kRows;
  const WinogradPlan plan = plan_of(a);
  Tensor v = scratch_like(like, a.groups * plan.group_tiles);
  void* tiles = v.mutable_data_ptr();
  const auto transform_tiles = winograd_tiles_kernel_best();
  parallel(a.groups * a.tiles, 1,
           [&](int64_t begin, int64_t end) { transform_tiles(a, tiles, begin, end); });
  const auto multiply = winograd_streamed_kernel_best();
  parallel(a.groups * plan.panels, 1, [&](int64_t begin, int64_t end) {
    Tensor each = scratch_like(like, plan.panel_scratch);
    multiply(a, tiles, begin, end, each.mutable_data_ptr());
  });
}

Tensor winograd_weight(const Tensor& weight, int64_t groups, int64_t tile) {
  Tensor w = weight;
  return transform(of_weight(weight, groups, tile, false, w), w);
}

Tensor winograd_conv(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                     std::optional<Tensor> residual, int64_t groups, int64_t padding, int64_t tile,
                     std::optional<Tensor> transformed, bool flipped) {
  Tensor w = weight;
  WinogradArgs a = of_weight(weight, groups, tile, flipped, w);
  const Tensor x = as_rows(input), b = bias.has_value() ? torch::stable::contiguous(*bias) : w;
  a.N = x.size(0), a.H = x.size(2), a.W = x.size(3), a.padding = padding;
  Tensor y = empty_nchw(a.N, groups * a.M, a.height(), a.width(), true, x);
  if (y.numel() == 0) return y;
  Tensor r = y;
  if (residual.has_value())
    r = torch::stable::contiguous(*residual, torch::headeronly::MemoryFormat::ChannelsLast);
  a.batch_step = x.stride(0), a.pixel_step = x.stride(x.size(3) > 1 ? 3 : 2);
  a.x = x.const_data_ptr();
  a.bias = bias.has_value() ? b.const_data_ptr() : nullptr;
  a.residual = residual.has_value() ? r.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  if (!transformed.has_value() && streams(a)) {
    conv_streamed(a, x);
    return y;
  }
  const Tensor u = transformed.has_value() ? *transformed : transform(a, x);
  a.u = u.const_data_ptr();
  a.tiles = tiles_of_block(a);
  const WinogradPlan plan = plan_of(a);
  const auto conv = winograd_conv_kernel_best();
  parallel(groups * a.blocks(), 1, [&](int64_t begin, int64_t end) {
    Tensor each = scratch_like(x, plan.scratch);
    conv(a, begin, end, each.mutable_data_ptr());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("winograd_conv", TORCH_BOX(&winograd_conv));
}

}  // namespace smis
