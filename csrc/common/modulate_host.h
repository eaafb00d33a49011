// What the cpu.cpp of dense and of indexed modulation share: layouts, operands, grain.
#pragma once
#include "modulate_args.h"
#include "tensor.h"

namespace smis {

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least

inline int64_t grain(int64_t elements_per_item) { return kGrain / std::max<int64_t>(elements_per_item, 1); }

// The tensor itself where its layout is the wanted one, else a copy.
inline Tensor laid_out(const Tensor& t, bool last) {
  if (last ? rows_dense(t) : planes_dense(t)) return t;
  return torch::stable::contiguous(t, last ? torch::headeronly::MemoryFormat::ChannelsLast
                                           : torch::headeronly::MemoryFormat::Contiguous);
}

inline Operand operand(const Tensor& t) {
  // Height 1 or width 1: the other axis carries the pixel stride.
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(t.size(3) > 1 ? 3 : 2)};
}

inline Tensor vector_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> shape(sizes);
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
                              type, std::nullopt, like.device());
}

inline ModulationBranch branch(const Tensor& mean, const Tensor& rstd, double slope) {
  ModulationBranch br;
  br.mean = mean.const_data_ptr();
  br.rstd = rstd.const_data_ptr();
  br.stat_n = mean.size(0) > 1;
  br.slope = slope;
  return br;
}

inline ModulationArgs arguments(const Tensor& x, bool upsample, bool pair) {
  ModulationArgs a;
  a.element = element_of(x, "modulation");
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.x = operand(x);
  a.upsample = upsample;
  a.branches = pair ? 2 : 1;
  return a;
}

inline Tensor absent(const Tensor& like) {
  return vector_like(like, {0}, like.scalar_type());
}

}  // namespace smis
