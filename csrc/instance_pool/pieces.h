// What sums and their way back share: pieces of runs, vectors cut short, groups of channels.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/element.h"
#include "common/lanes.h"
#include "instance_pool/cpu_kernel.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // pixels summed in the narrow type before a bin in fp64

// Unsigned integers of an element's size.
template <size_t size> struct Bits { using type = uint16_t; };
template <> struct Bits<4> { using type = uint32_t; };
template <> struct Bits<8> { using type = uint64_t; };
template <class T> using BitsOf = typename Bits<sizeof(T)>::type;

// The first n lanes of a, then those of b.
template <class V> inline V first_lanes(int64_t n, V a, V b = V{}) {
  using I = std::make_signed_t<BitsOf<std::decay_t<decltype(a[0])>>>;
  typedef I Index __attribute__((vector_size(sizeof(V))));
  Index lane;
#pragma GCC unroll 32
  for (int i = 0; i < int(sizeof(V) / sizeof(I)); ++i) lane[i] = I(i);
  return lane < Index{} + I(n) ? a : b;
}

// f(0), ..., f(K - 1) without a loop: what they index stays in registers.
template <class F, int... I> inline void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int K, class F> inline void each(F&& f) { each(f, std::make_integer_sequence<int, K>{}); }

// Calls piece(label, begin, end) for what [first, last) holds of each run from `r` on, counted from
// `first`; r becomes the run that goes on behind it.
template <class F>
inline void each_piece(const Stripe& s, int64_t first, int64_t last, int64_t& r, F&& piece) {
  int64_t n = r;
  for (int64_t p = first; p < last; ++n) {
    const int64_t stop = std::min<int64_t>(s.ends[n], last);
    piece(s.labels[n], p - first, stop - first);
    p = stop;
  }
  r = s.ends[n - 1] > last ? n - 1 : n;
}

// A loop over K channels at a time, as templates for K = 8, 4, 3, 2 and 1.
#define SMIS_BY_GROUPS(name, call)                                                        \
  template <class T>                                                                      \
  void name(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {     \
    int64_t c = begin;                                                                    \
    for (; c + 8 <= end; c += 8) call<T, 8>(a, s, c);                                     \
    for (; c + 4 <= end; c += 4) call<T, 4>(a, s, c);                                     \
    if (end - c == 3) call<T, 3>(a, s, c);                                                \
    else if (end - c == 2) call<T, 2>(a, s, c);                                           \
    else if (end - c == 1) call<T, 1>(a, s, c);                                           \
  }

}  // namespace
}  // namespace smis::SMIS_ISA
