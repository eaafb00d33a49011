// Sums of runs: several channels at a time, whose lanes are then added up together.
#pragma once
#include "instance_pool/pieces.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace smis::SMIS_ISA {
namespace {

// Sums take half of the widest registers: runs are short, and more units add and shuffle them.
constexpr int kSumBytes = kVectorBytes > 32 ? 32 : kVectorBytes;
template <class T> struct SumLanes {
  typedef T vec __attribute__((vector_size(kSumBytes), aligned(sizeof(T))));
  static constexpr int64_t n = kSumBytes / int64_t(sizeof(T));
};
template <class T> using Sum = typename SumLanes<T>::vec;
template <class T> inline Sum<T> get_sum(const T* p) { return *reinterpret_cast<const Sum<T>*>(p); }

constexpr int kBlock = 16;  // bytes that shuffles of every instruction set stay within

// Sums of neighbours: in each block of 16 bytes first those of a, then those of b.
template <class A, int... I>
inline Sum<A> neighbours(Sum<A> a, Sum<A> b, std::integer_sequence<int, I...>) {
  constexpr int n = kBlock / int(sizeof(A)), L = int(SumLanes<A>::n);
  constexpr auto from = [](int i) { return i / n * n + i % n * 2 % n + (i % n < n / 2 ? 0 : L); };
  return shuffled(a, b, std::integer_sequence<int, from(I)...>{}) +
         shuffled(a, b, std::integer_sequence<int, (from(I) + 1)...>{});
}

// The sums of both halves of a vector of `lanes`.
template <class A, int lanes, class V> inline auto folded(V v) {
  typedef A Part __attribute__((vector_size(lanes / 2 * sizeof(A))));
  Part parts[2];
  static_assert(sizeof(parts) == sizeof(v));
  std::memcpy(parts, &v, sizeof(v));
  return parts[0] + parts[1];
}

// bins[0..K) += a block of sums; whole blocks without taking it apart.
template <class A, int K, int lanes, class V> inline void add_block(V v, double* bins) {
  if constexpr (lanes * sizeof(A) > kBlock) {
    add_block<A, K, lanes / 2>(folded<A, lanes>(v), bins);
  } else if constexpr (K < lanes) {
    each<K>([&](auto k) { bins[k] += v[k.value]; });
  } else {
    typedef double Wide __attribute__((vector_size(lanes * sizeof(double)), aligned(8)));
#if defined(__AVX__)
    if constexpr (sizeof(A) == 4) {  // which the builtin converts by halves
      *reinterpret_cast<Wide*>(bins) += _mm256_cvtps_pd(v);
      return;
    }
#endif
    *reinterpret_cast<Wide*>(bins) += __builtin_convertvector(v, Wide);
  }
}

// bins[k] += the sum over the lanes of v[k], K a power of two: within blocks, then over them.
template <int K, int in_block, class A, int vectors>
inline void add_sums(const Sum<A> (&v)[vectors], double* bins) {
  constexpr int L = int(SumLanes<A>::n), half = vectors > 1 ? vectors / 2 : 1;
  if constexpr (in_block == 1) {
    each<vectors>([&](auto k) { add_block<A, K, L>(v[k], bins + k * (kBlock / sizeof(A))); });
  } else {
    Sum<A> next[half];
    each<half>([&](auto i) {
      next[i] = neighbours<A>(v[2 * i], v[vectors > 1 ? 2 * i + 1 : 0],
                              std::make_integer_sequence<int, L>{});
    });
    add_sums<K, in_block / 2, A>(next, bins);
  }
}

// n values as the accumulation type, with a vector of memory behind them that may be read.
template <class T>
inline const Acc<T>* readable(const T* p, int64_t n, bool slack, Acc<T>* buffer) {
  const Acc<T>* v = staged(p, n, buffer);
  if (slack || v == buffer) return v;
  std::memcpy(buffer, v, size_t(n) * sizeof(Acc<T>));
  return buffer;
}

// Rows of K channels to K planes; a stride that the compiler knows is vectorised.
template <class T, int K>
inline void unzip(const T* rows, int64_t stride, int64_t n, Acc<T>* const (&planes)[K]) {
  const auto from = [&](auto step) {
    for (int64_t i = 0; i < n; ++i)
      each<K>([&](auto k) { planes[k][i] = load(rows[i * step + k]); });
  };
  if (stride == K) from(std::integral_constant<int64_t, K>{});
  else from(stride);
}

// K channels from c on: planes, or rows of few channels that are made planes a chunk at a time.
template <class T, int K>
void sums_of(const InstancePoolArgs& a, const Stripe& s, int64_t c) {
  using A = Acc<T>;
  constexpr int P = K == 3 ? 4 : K;
  constexpr int64_t L = SumLanes<A>::n;
  alignas(64) A buffer[K][kChunk + L];
  A* planes[K];
  for (int k = 0; k < K; ++k) planes[k] = buffer[k];
  double* bins = a.partial + s.first * a.partial_row + c;
  for (int64_t l = 0; l < s.ids; ++l)
    for (int k = 0; k < P; ++k) bins[l * a.partial_row + k] = 0;
  int64_t r = 0;
  for (int64_t first = s.begin; first < s.end; first += kChunk) {
    const int64_t last = std::min(first + kChunk, s.end);
    const T* x = at<const T>(a.x, s.n, a.c0 + c, first);
    const A* v[K];
    if (a.rows) unzip<T, K>(x, a.x.p, last - first, planes);
    for (int k = 0; k < K; ++k)
      v[k] = a.rows ? planes[k]
                    : readable(x + k * a.x.c, last - first, last + L <= a.pixels, planes[k]);
    each_piece(s, first, last, r, [&](int32_t label, int64_t i, int64_t stop) {
      const int64_t head = ((stop - i - 1) & (L - 1)) + 1;
      Sum<A> sum[P] = {};
      each<K>([&](auto k) { sum[k] = first_lanes(head, get_sum(v[k] + i)); });
      for (i += head; i < stop; i += L) each<K>([&](auto k) { sum[k] += get_sum(v[k] + i); });
      add_sums<P, kBlock / int(sizeof(A)), A>(sum, bins + label * a.partial_row);
    });
  }
}

SMIS_BY_GROUPS(sums_planes, sums_of)

// Rows [begin, end) of one image's means, R values apart where they are summed.
template <class T, class Row>
void merge_rows(const InstancePoolArgs& a, const Merge& m, int64_t begin, int64_t end, Row R) {
  std::fill(m.sums + begin * R, m.sums + end * R, 0.0);
  for (int64_t i = 0; i < m.count; ++i) {
    const Stripe& s = m.stripes[i];
    if (s.high <= begin || s.low >= end) continue;
    const double* part = a.partial + s.first * R;
    for (int64_t l = 0; l < s.ids; ++l) {
      if (s.rows[l] < begin || s.rows[l] >= end) continue;
      double* sum = m.sums + s.rows[l] * R;
      for (int64_t k = 0; k < R; ++k) sum[k] += part[l * R + k];
    }
  }
  T* means = static_cast<T*>(a.means) + m.stripes[0].image * a.mean_row;
  for (int64_t row = begin; row < end; ++row) {
    double* sum = m.sums + row * R;
    const double pixels = double(m.pixels[row]);
    for (int64_t k = 0; k < R; ++k) sum[k] /= pixels;
    for (int64_t k = 0; k < a.channels; ++k) store(means[row * a.mean_row + k], Acc<T>(sum[k]));
  }
}

template <class T>
void merge(const InstancePoolArgs& a, const Merge& m, int64_t begin, int64_t end) {
  if (a.partial_row == 4) merge_rows<T>(a, m, begin, end, std::integral_constant<int64_t, 4>{});
  else merge_rows<T>(a, m, begin, end, a.partial_row);
}

}  // namespace
}  // namespace smis::SMIS_ISA
