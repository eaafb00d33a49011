// Vectors of the widest registers of the instruction set, and the register tile of a product.
#pragma once
#include <cstdint>

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

// c[r][v] (+)= sum over k of a[r][k] * b[k][v]: kTileRows rows, `vecs` vectors of columns, all sums
// in registers. Strides are in elements; `add` keeps what c holds.
template <class T, int vecs, bool add>
inline void product_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k,
                         int64_t depth, T* c, int64_t c_row) {
  constexpr int64_t L = Lanes<T>::n;
  Vec<T> sum[kTileRows][vecs] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_k, b += b_k) {
    Vec<T> right[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) right[v] = get(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const T left = a[r * a_row];
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) sum[r][v] += right[v] * left;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      T* out = c + r * c_row + v * L;
      put(out, add ? Vec<T>(get(out) + sum[r][v]) : sum[r][v]);
    }
}

}  // namespace smis::SMIS_ISA
