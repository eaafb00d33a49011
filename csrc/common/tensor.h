// What every op's cpu.cpp and cuda.cu needs of the LibTorch stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "ids.h"

namespace smis {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws one line, without the build's path and line that STD_TORCH_CHECK adds.
template <class... Words> [[noreturn]] void refuse(const Words&... words) {
  std::ostringstream line;
  (line << ... << words);
  throw std::runtime_error(line.str());
}

inline Element element_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    default: refuse(op, ": expected dtype float32, float64, float16 or bfloat16; cast it first");
  }
}

inline Ids ids_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return Ids::u8;
    case ScalarType::Char: return Ids::i8;
    case ScalarType::Short: return Ids::i16;
    case ScalarType::UInt16: return Ids::u16;
    case ScalarType::Int: return Ids::i32;
    case ScalarType::Long: return Ids::i64;
    default: refuse(name, ": expected an integer dtype; cast it first");
  }
}

// Offsets inside a plane are 32-bit.
inline void check_plane(const char* name, int64_t height, int64_t width) {
  if (height * width >= int64_t(1) << 31)
    refuse(name, ": expected fewer than 2^31 pixels in a plane, got ", height, " x ", width,
           "; cut it into tiles");
}

// Sums and statistics are kept in fp32, in fp64 for fp64.
inline ScalarType acc_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (N, C, H, W) with each plane dense (stride of W is 1, of H is W): any batch or channel slice.
inline bool planes_dense(const Tensor& t) {
  return (t.size(3) <= 1 || t.stride(3) == 1) && (t.size(2) <= 1 || t.stride(2) == t.size(3));
}

// (N, C, H, W) stored (N, H, W, C), channels dense, pixels evenly spaced: channel slices too.
inline bool rows_dense(const Tensor& t) {
  return (t.size(1) <= 1 || t.stride(1) == 1) &&
         (t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.size(3) * t.stride(3));
}

inline bool channels_last(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && (t.size(2) * t.size(3) > 1) && rows_dense(t) &&
         t.stride(t.size(3) > 1 ? 3 : 2) >= t.size(1);
}

constexpr int64_t kStreamBytes = 8 << 20;  // outputs from this size on do not stay in L2

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least

inline int64_t grain(int64_t elements_per_item) { return kGrain / std::max<int64_t>(elements_per_item, 1); }

template <class F>
inline void parallel(int64_t count, int64_t grain, const F& fn) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), fn);
}

inline Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type, std::nullopt,
      like.device());
}

// An empty (N, C, H, W) of `like`'s dtype and device in the wanted memory format.
inline Tensor empty_nchw(int64_t n, int64_t c, int64_t h, int64_t w, bool last, const Tensor& like) {
  return torch::stable::empty(
      {n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      last ? torch::headeronly::MemoryFormat::ChannelsLast
           : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace smis
