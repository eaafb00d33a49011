// CPU implementation of the 3x3 convolution by Winograd's F(2x2, 3x3) and F(4x4, 3x3): scratch, threads.
// The loops: cpu_kernel.cpp.
#include "common/conv_host.h"
#include "winograd_conv/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kBlockBytes = 4 << 20, kLeastTiles = 128;  // of the weight's gradient
constexpr int64_t kMostRows = 64, kLeastRows = 16;            // multiples of gradient.h's D
constexpr int64_t kMostStreamed = 64;   // tiles; each panel reads them again (choice.py: MOST_STREAMED)

// The kernels' side of the arguments; `w` is the weight as they read it.
WinogradArgs of_weight(const Tensor& weight, int64_t groups, int64_t tile, bool flipped, Tensor& w) {
  WinogradArgs a;
  read_weight(a, weight, groups, flipped, w);
  a.tile = tile;
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
  if (residual.has_value()) r = reformatted(*residual, true);
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
  a.tiles = tiles_of_block(a, a.all_tiles(), a.frequencies());
  const WinogradPlan plan = plan_of(a);
  const auto conv = winograd_conv_kernel_best();
  parallel(groups * a.blocks(), 1, [&](int64_t begin, int64_t end) {
    Tensor each = scratch_like(x, plan.scratch);
    conv(a, begin, end, each.mutable_data_ptr());
  });
  return y;
}

// In channels-last memory. Both sides' transforms of a block of tiles stay in the last cache.
Tensor winograd_weight_gradient(const Tensor& input, const Tensor& grad, int64_t groups, int64_t padding) {
  const Tensor x = as_rows(input), g = as_rows(grad);
  WinogradGradientArgs a;
  a.wide = x.scalar_type() == ScalarType::Double;
  a.groups = groups, a.K = x.size(1) / groups, a.M = g.size(1) / groups, a.padding = padding;
  a.N = x.size(0), a.H = x.size(2), a.W = x.size(3), a.height = g.size(2), a.width = g.size(3);
  a.x_batch = x.stride(0), a.x_pixel = x.stride(a.W > 1 ? 3 : 2);
  a.grad_batch = g.stride(0), a.grad_pixel = g.stride(a.width > 1 ? 3 : 2);
  a.x = x.const_data_ptr(), a.grad = g.const_data_ptr();
  Tensor out = empty_nchw(groups * a.M, a.K, 3, 3, true, x);
  const int64_t all = a.all_tiles();
  if (all == 0 || out.numel() == 0) return torch::stable::zero_(out);
  a.dweight = out.mutable_data_ptr();

  const int64_t most = kBlockBytes / (16 * groups * (a.K + a.M) * (a.wide ? 8 : 4));
  const int64_t blocks = (all + std::max(most, kLeastTiles) - 1) / std::max(most, kLeastTiles);
  a.tiles = (all + blocks - 1) / blocks;
  const auto plan_of = [&] {
    WinogradGradientPlan plan;
    winograd_gradient_plan_best()(a, &plan);
    return plan;
  };
  a.rows = kMostRows;
  while (a.rows > kLeastRows && plan_of().items < 4 * int64_t(torch::stable::get_num_threads())) a.rows /= 2;
  const WinogradGradientPlan plan = plan_of();
  Tensor v = scratch_like(x, plan.v), d = scratch_like(x, plan.d), u = scratch_like(x, blocks > 1 ? plan.u : 0);
  a.v = v.mutable_data_ptr(), a.d = d.mutable_data_ptr();
  a.u = blocks > 1 ? u.mutable_data_ptr() : nullptr;
  const auto transform = winograd_gradient_tiles_kernel_best();
  const auto multiply = winograd_gradient_kernel_best();
  for (a.first = 0; a.first < all; a.first += a.tiles) {
    a.count = std::min(a.tiles, all - a.first);
    parallel(a.count, 8, [&](int64_t begin, int64_t end) { transform(a, begin, end); });
    parallel(plan.items, 1, [&](int64_t begin, int64_t end) {
      Tensor each = scratch_like(x, blocks > 1 ? 0 : plan.scratch);
      multiply(a, begin, end, each.mutable_data_ptr());
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("winograd_conv", TORCH_BOX(&winograd_conv));
  m.impl("winograd_weight_gradient", TORCH_BOX(&winograd_weight_gradient));
}

}  // namespace smis
