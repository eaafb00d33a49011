// CPU implementation of convolutions by phases: scratch, threads. The loops: cpu_kernel.cpp.
#include "common/conv_host.h"
#include "polyphase_conv/cpu_kernel.h"

namespace smis {
namespace {

// The kernels' side of the arguments; `w` is the weight as they read it.
PolyphaseArgs of_weight(const Tensor& weight, int64_t groups, int64_t stride, bool transposed, Tensor& w) {
  PolyphaseArgs a;
  read_weight(a, weight, groups, transposed, w);
  a.stride = stride;
  a.transposed = transposed && stride == 2;
  return a;
}

PolyphasePlan plan_of(const PolyphaseArgs& a) {
  PolyphasePlan plan;
  polyphase_plan_best()(a, &plan);
  return plan;
}

Tensor transform(const PolyphaseArgs& a, const Tensor& like) {
  Tensor u = scratch_like(like, a.groups * a.kPhases * a.transformed());
  void* to = u.mutable_data_ptr();
  const auto kernel = polyphase_weight_kernel_best();
  parallel(a.groups * plan_of(a).panels, 1, [&](int64_t begin, int64_t end) { kernel(a, to, begin, end); });
  return u;
}

Tensor polyphase_weight(const Tensor& weight, int64_t groups, int64_t stride, bool transposed) {
  Tensor w = weight;
  return transform(of_weight(weight, groups, stride, transposed, w), w);
}

Tensor polyphase_conv(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t groups,
                      int64_t stride, int64_t padding_y, int64_t padding_x, bool transposed, int64_t height,
                      int64_t width, std::optional<Tensor> transformed) {
  Tensor w = weight;
  PolyphaseArgs a = of_weight(weight, groups, stride, transposed, w);
  const Tensor x = as_rows(input), b = bias.has_value() ? torch::stable::contiguous(*bias) : w;
  a.N = x.size(0), a.H = x.size(2), a.W = x.size(3), a.height = height, a.width = width;
  // The transposed conv of stride 1 is the conv with its taps in reverse.
  const bool reversed = transposed && stride == 1;
  a.padding_y = reversed ? a.side() - 1 - padding_y : padding_y;
  a.padding_x = reversed ? a.side() - 1 - padding_x : padding_x;
  Tensor y = empty_nchw(a.N, groups * a.M, height, width, true, x);
  if (y.numel() == 0) return y;
  a.batch_step = x.stride(0), a.pixel_step = x.stride(x.size(3) > 1 ? 3 : 2);
  a.x = x.const_data_ptr();
  a.bias = bias.has_value() ? b.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  const Tensor u = transformed.has_value() ? *transformed : transform(a, x);
  a.u = u.const_data_ptr();
  a.tiles = tiles_of_block(a, a.all_tiles(), a.kFrequencies);
  const int64_t scratch = plan_of(a).scratch;
  const auto conv = polyphase_conv_kernel_best();
  parallel(groups * a.blocks(), 1, [&](int64_t begin, int64_t end) {
    Tensor each = scratch_like(x, scratch);
    conv(a, begin, end, each.mutable_data_ptr());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("polyphase_weight", TORCH_BOX(&polyphase_weight));
  m.impl("polyphase_conv", TORCH_BOX(&polyphase_conv));
}

}  // namespace smis
