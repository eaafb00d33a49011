// Rows read by vectors: whole ones, the rest, and their transposition.
#pragma once
#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace smis::SMIS_ISA {

// Calls fn at every vector of `count` values; the last one lies where it ends with them. Fewer
// values than a vector hold are read and written by `some` instead.
template <class A, class F, class G>
inline void over_vectors(int64_t count, const F& whole, const G& some) {
  constexpr int64_t L = Lanes<A>::n;
  if (count < L) return some();
  for (int64_t i = 0; i + L <= count; i += L) whole(i);
  if (count % L != 0) whole(count - L);
}

template <class A> Vec<A> get_some(const A* p, int64_t count) {
  alignas(kVectorBytes) A values[Lanes<A>::n] = {};
  std::memcpy(values, p, size_t(count) * sizeof(A));
  return get(values);
}

// to(i)[l] = from[l * step + i] of `count` rows l, in vectors; lanes beyond them are zero.
template <class A, class To>
void transposed(const A* from, int64_t step, int64_t count, int64_t columns, const To& to) {
  constexpr int64_t L = Lanes<A>::n;
  const auto square = [&](int64_t i, const auto& read) {
    Vec<A> lines[L] = {};
    if (count == L) {
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) lines[l] = read(from + l * step + i);
    } else {
      for (int64_t l = 0; l < count; ++l) lines[l] = read(from + l * step + i);
    }
    transpose<A>(lines);
    const int64_t some = std::min(L, columns - i);
    for (int64_t j = 0; j < some; ++j) put(to(i + j), lines[j]);
  };
  over_vectors<A>(
      columns, [&](int64_t i) { square(i, [](const A* p) { return get(p); }); },
      [&] { square(0, [&](const A* p) { return get_some(p, columns); }); });
}

}  // namespace smis::SMIS_ISA
