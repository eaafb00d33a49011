// What the CPU convs' cpu.cpp share: features by pixels, weights as they lie, blocks of tiles.
#pragma once
#include "conv_weight.h"
#include "reformat/host.h"

namespace smis {

constexpr int64_t kMostTiles = 128, kRows = 8;
constexpr int64_t kCache = 1800 << 10;  // bytes that stay in a core's second cache

// Tiles of a block, in blocks that the threads share evenly: where the transformed kernels of
// `frequencies` fit the cache, as many as fit beside them; else as many as pay for reading the kernels
// from further away.
inline int64_t tiles_of_block(const ConvWeight& a, int64_t all, int64_t frequencies) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = frequencies * (a.wide ? 8 : 4);
  const int64_t beside = (kCache - bytes * a.K * a.M) / (bytes * (a.K + a.M));
  const int64_t most = beside >= 2 * kRows ? std::min<int64_t>(beside, kMostTiles) : kMostTiles;
  int64_t blocks = (all + most - 1) / most;
  while (a.groups * blocks % threads != 0 && a.groups * blocks < 8 * threads) ++blocks;
  return ((all + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
}

inline Tensor as_rows(const Tensor& t) {
  const bool dense = t.stride(1) == 1 && rows_dense(t) && t.size(2) * t.size(3) > 1;
  return dense ? t : reformatted(t, true);
}

inline Tensor scratch_like(const Tensor& like, int64_t count) {
  return torch::stable::empty({count}, like.scalar_type(), std::nullopt, like.device());
}

// Fills what `a` says of the weight; `w` is the weight as the kernels read it.
inline void read_weight(ConvWeight& a, const Tensor& weight, int64_t groups, bool flipped, Tensor& w) {
  const int64_t taps = weight.size(2) * weight.size(3), in = weight.size(1);
  const bool last = !flipped && in > 1 && weight.stride(1) == 1 && weight.stride(3) == in &&
                    weight.stride(2) == weight.size(3) * in && weight.stride(0) == taps * in;
  w = last ? weight : torch::stable::contiguous(weight);
  a.wide = w.scalar_type() == ScalarType::Double;
  a.groups = groups, a.K = in, a.M = w.size(0) / groups, a.taps = taps;
  a.out_step = a.k_step = taps;
  a.flipped = flipped;
  if (flipped) std::swap(a.K, a.M);
  if (flipped) a.k_step = taps * a.M;
  else a.out_step = taps * a.K;
  if (last) a.k_step = 1, a.tap_step = a.K;
  a.weight = w.const_data_ptr();
}

}  // namespace smis
