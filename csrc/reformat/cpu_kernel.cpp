// Squares of a register's lanes change places: vectors of pixels of some channels become vectors of
// channels of some pixels, or the other way round.
#include "reformat/cpu_kernel.h"

#include "common/transposed.h"

namespace smis::SMIS_ISA {
namespace {

// to[j * to_step + i] = from[i * from_step + j] of a square.
template <class A> void square(const A* from, int64_t from_step, A* to, int64_t to_step) {
  constexpr int64_t L = Lanes<A>::n;
  Vec<A> lines[L];
#pragma GCC unroll 16
  for (int64_t i = 0; i < L; ++i) lines[i] = get(from + i * from_step);
  transpose<A>(lines);
#pragma GCC unroll 16
  for (int64_t j = 0; j < L; ++j) put(to + j * to_step, lines[j]);
}

template <class A> void block(const ReformatArgs& a, int64_t image, int64_t first) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t pixels = std::min(ReformatArgs::kBlock, a.P - first);
  const A* from = static_cast<const A*>(a.from) + image * a.batch_step + (a.last ? first : first * a.step);
  A* to = static_cast<A*>(a.to) + image * a.C * a.P + (a.last ? first * a.C : first);
  const auto one_by_one = [&] {
    for (int64_t c = 0; c < a.C; ++c)
      for (int64_t p = 0; p < pixels; ++p) {
        if (a.last) to[p * a.C + c] = from[c * a.step + p];
        else to[c * a.P + p] = from[p * a.step + c];
      }
  };
  if (pixels < L) return one_by_one();
  // Pixels inside: planes lie powers of two apart, whose lines push each other out of the caches.
  const auto channels = [&](int64_t c) {
    over_vectors<A>(pixels, [&](int64_t p) {
      if (a.last) square(from + c * a.step + p, a.step, to + p * a.C + c, a.C);
      else square(from + p * a.step + c, a.step, to + c * a.P + p, a.P);
    }, [] {});
  };
  over_vectors<A>(a.C, channels, one_by_one);
}

template <class A> void blocks(const ReformatArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    block<A>(a, i / a.blocks(), i % a.blocks() * ReformatArgs::kBlock);
}

}  // namespace

void reformat_kernel(const ReformatArgs& a, int64_t begin, int64_t end) {
  if (a.bytes == 8) blocks<double>(a, begin, end);
  else if (a.bytes == 4) blocks<float>(a, begin, end);
  else blocks<int16_t>(a, begin, end);
}

}  // namespace smis::SMIS_ISA
