// CPU implementations of the conditional convolution: operands, scratch, threads. The loops:
// cpu_kernel.cpp.
#include "common/host.h"
#include "conditional_conv/scratch.h"

namespace smis {
namespace {

constexpr int64_t kTransformedBytes = 8 << 20;  // transformed condition kept at a time

Tensor dense(const Tensor& t) { return rows_dense(t) || planes_dense(t) ? t : torch::stable::contiguous(t); }

int64_t bytes_of(const Tensor& like) { return acc_type(like) == ScalarType::Double ? 8 : 4; }

Tensor sums(const Tensor& like, int64_t count) { return empty_of(like, {count}, acc_type(like)); }

struct Problem {
  ConditionalConvArgs a;
  Tensor x, h, weight, bias, v;
  int64_t lanes = 0, blocks = 0, most = 0;

  Problem(const Tensor& input, const Tensor& condition, const Tensor& w,
          const std::optional<Tensor>& b, int64_t tile = 2)
      : x(dense(input)), h(dense(condition)), weight(torch::stable::contiguous(w)),
        bias(b.has_value() ? torch::stable::contiguous(*b) : w) {
    a.element = element_of(x, "conditional_conv");
    a.C = x.size(1), a.D = h.size(1);
    a.tiling = Tiling(x.size(0), x.size(2), x.size(3), tile);
    a.x = operand(x), a.h = operand(h);
    a.weight = weight.const_data_ptr();
    a.bias = b.has_value() ? bias.const_data_ptr() : nullptr;
    conditional_conv_lanes_best()(a.element, &lanes);
    blocks = (a.C + lanes - 1) / lanes;
    const int64_t each = std::max<int64_t>(a.transformed() * bytes_of(x), 1);
    most = std::clamp<int64_t>(kTransformedBytes / each, 1, a.tiling.regions());
    v = sums(x, most * a.transformed());
    a.v = v.mutable_data_ptr();
  }

  // Calls fn() for some regions at a time, their condition transformed.
  template <class F> void over_regions(const F& fn) {
    for (a.first = 0; a.first < a.tiling.regions(); a.first += most) {
      a.count = std::min(most, a.tiling.regions() - a.first);
      run(transform_condition_kernel_best(), a.count, a.tiling.patch_pixels() * a.depth());
      fn();
    }
  }

  template <class K> void run(const K& kernel, int64_t items, int64_t elements) {
    parallel(items, 1, [&](int64_t begin, int64_t end) {
      Tensor scratch = sums(x, elements);
      kernel(a, begin, end, scratch.mutable_data_ptr());
    });
  }
};

Tensor conditional_conv(const Tensor& input, const Tensor& condition, const Tensor& weight,
                        std::optional<Tensor> bias, int64_t tile) {
  if (tile != 2 && tile != 4) refuse("tile", ": expected 2 or 4, got ", tile);
  Tensor y = empty_nchw(input.size(0), input.size(1), input.size(2), input.size(3),
                        channels_last(input), input);
  if (y.numel() == 0) return y;
  Problem p(input, condition, weight, bias, tile);
  p.a.y = operand(y);
  p.over_regions([&] {
    p.run(conditional_conv_kernel_best(), p.blocks * p.a.count, block_scratch(p.a, p.lanes));
  });
  return y;
}

// Zeros of the sums' type, in the format of `like`.
Tensor zeros_like(const Tensor& like) {
  Tensor zeros = torch::stable::empty(
      {like.size(0), like.size(1), like.size(2), like.size(3)}, acc_type(like), std::nullopt,
      like.device(), std::nullopt,
      channels_last(like) ? torch::headeronly::MemoryFormat::ChannelsLast
                          : torch::headeronly::MemoryFormat::Contiguous);
  torch::stable::zero_(zeros);
  return zeros;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conditional_conv_backward(
    const Tensor& grad, const Tensor& input, const Tensor& condition, const Tensor& weight,
    std::optional<Tensor> bias, bool need_input, bool need_condition, bool need_weight) {
  const ScalarType type = input.scalar_type();
  const auto absent = [&] { return empty_of(input, {0}, type); };
  if (input.numel() == 0) {
    const auto zeros = [&](std::initializer_list<int64_t> sizes) {
      Tensor t = torch::stable::empty(sizes, type, std::nullopt, input.device());
      torch::stable::zero_(t);
      return t;
    };
    return {need_input ? torch::stable::to(zeros_like(input), type) : absent(),
            need_condition ? torch::stable::to(zeros_like(condition), type) : absent(),
            need_weight ? zeros({weight.size(0), weight.size(1), 3, 3}) : absent(),
            need_weight ? zeros({weight.size(0)}) : absent()};
  }
  Problem p(input, condition, weight, bias);
  const Tensor y = dense(grad);
  p.a.y = operand(y);
  Tensor dx = absent(), dh = absent(), dweight = absent(), dbias = absent(), du, dv;
  if (need_input) {
    dx = zeros_like(input);
    p.a.dx = operand(dx);
  }
  if (need_condition) {
    dh = zeros_like(condition);
    dv = sums(input, p.most * p.a.transformed());
    p.a.dh = operand(dh);
    p.a.dv = dv.mutable_data_ptr();
  }
  if (need_weight) {
    du = sums(input, p.blocks * block_weights(p.a, p.lanes));
    torch::stable::zero_(du);
    p.a.du = du.mutable_data_ptr();
    dbias = sums(input, 9 * p.a.C);
    torch::stable::zero_(dbias);
    p.a.dbias = dbias.mutable_data_ptr();
    dweight = torch::stable::empty({9 * p.a.C, p.a.D, 3, 3}, type, std::nullopt, input.device());
    p.a.dweight = dweight.mutable_data_ptr();
  }
  const int64_t scratch = block_scratch(p.a, p.lanes);
  p.over_regions([&] {
    if (need_input || need_weight)
      p.run(conditional_conv_backward_kernel_best(), p.blocks, scratch);
    if (need_condition) {
      p.run(condition_gradient_kernel_best(), p.a.count, scratch);
      p.run(finish_condition_gradient_kernel_best(), (p.a.D + p.lanes - 1) / p.lanes,
            block_patch(p.a, p.lanes));
    }
  });
  if (need_weight) {
    const auto finish = finish_weight_gradient_kernel_best();
    parallel(p.blocks, 1, [&](int64_t begin, int64_t end) { finish(p.a, begin, end); });
  }
  return {torch::stable::to(dx, type), torch::stable::to(dh, type), dweight,
          torch::stable::to(dbias, type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("conditional_conv", TORCH_BOX(&conditional_conv));
  m.impl("conditional_conv_backward", TORCH_BOX(&conditional_conv_backward));
}

}  // namespace smis
