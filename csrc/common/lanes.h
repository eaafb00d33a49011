// Vectors of the widest registers of the instruction set, and the register tile of a product.
#pragma once
#include <cstdint>
#include <utility>

namespace smis::SMIS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 4;
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
#endif

template <class T> struct Lanes {
  typedef T vec __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  static constexpr int64_t n = kVectorBytes / int64_t(sizeof(T));
};

template <class T> using Vec = typename Lanes<T>::vec;
template <class T> inline Vec<T> get(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> inline void put(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }

// Lane j of the result is lane order[j] of a and b, one after the other.
template <class V, int... order> inline V shuffled(V a, V b, std::integer_sequence<int, order...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, order...);
#else
  using Order = decltype(a < b);
  return __builtin_shuffle(a, b, Order{order...});
#endif
}

// One step of a transposition: swaps the lanes in which bit `step` differs between the vectors'
// numbers and the lanes'.
template <int step, class V, int... j>
inline void exchange(V& a, V& b, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  const V low = shuffled(a, b, std::integer_sequence<int, ((j & step) ? n + (j ^ step) : j)...>{});
  b = shuffled(a, b, std::integer_sequence<int, ((j & step) ? n + j : (j ^ step))...>{});
  a = low;
}

// n vectors of n lanes: lane j of vector i and lane i of vector j change places.
template <class T, int step = 1> inline void transpose(Vec<T>* v) {
  constexpr int n = int(Lanes<T>::n);
  if constexpr (step < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & step)) exchange<step>(v[i], v[i | step], std::make_integer_sequence<int, n>{});
    transpose<T, 2 * step>(v);
  }
}

// sum[r][v] += left(r, k) * b[k][v] over k < depth, `b_k` elements from one k to the next. The sums
// stay in registers: kTileRows rows of three vectors, or two less of four with AVX-512, fill them.
template <class T, int rows, int vecs, class Left>
__attribute__((always_inline)) inline void multiply_into(Vec<T> (&sum)[rows][vecs], const Left& left,
                                                         const T* b, int64_t b_k, int64_t depth) {
  constexpr int64_t L = Lanes<T>::n;
  for (int64_t k = 0; k < depth; ++k, b += b_k) {
    Vec<T> right[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) right[v] = get(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const T factor = left(r, k);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) sum[r][v] += right[v] * factor;
    }
  }
}

// c[r][v] (+)= sum over k of a[r][k] * b[k][v]; strides are in elements; `add` keeps what c holds.
template <class T, int vecs, bool add, int rows = kTileRows>
inline void product_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k,
                         int64_t depth, T* c, int64_t c_row) {
  constexpr int64_t L = Lanes<T>::n;
  Vec<T> sum[rows][vecs] = {};
  multiply_into<T>(sum, [&](int r, int64_t k) { return a[r * a_row + k * a_k]; }, b, b_k, depth);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      T* out = c + r * c_row + v * L;
      put(out, add ? Vec<T>(get(out) + sum[r][v]) : sum[r][v]);
    }
}

}  // namespace smis::SMIS_ISA
