// Means back to the pixels of their runs, each vector written once.
#pragma once
#include "common/stream.h"
#include "instance_pool/pieces.h"

namespace smis::SMIS_ISA {
namespace {

// One vector of the widest registers, past the caches, to where they are aligned.
template <class V> inline void stream_vector(void* dst, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(dst), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(dst), reinterpret_cast<__m256i>(v));
#else
  std::memcpy(dst, &v, sizeof(v));
#endif
}

// The means of pixels [first, last), a vector at a time: those that runs share are put together in
// registers, so that each is written once.
template <bool stream, class T, int K>
void fill(const InstancePoolArgs& a, const Stripe& s, int64_t c, int64_t first, int64_t last,
          int64_t& r, T* const (&out)[K]) {
  using B = BitsOf<T>;
  constexpr int64_t L = Lanes<B>::n;
  const T* means = static_cast<const T*>(a.means) + s.image * a.mean_row + c;
  Vec<B> line[K] = {};
  const auto write = [&](int64_t i) {
    each<K>([&](auto k) {
      if constexpr (stream) stream_vector(out[k] + i, line[k]);
      else std::memcpy(out[k] + i, &line[k], sizeof(line[k]));
    });
  };
  each_piece(s, first, last, r, [&](int32_t label, int64_t i, int64_t stop) {
    const T* row = means + s.rows[label] * a.mean_row;
    Vec<B> mean[K];
    each<K>([&](auto k) {
      B bits;
      std::memcpy(&bits, row + k, sizeof(bits));
      mean[k] = Vec<B>{} + bits;
      line[k] = first_lanes(i & (L - 1), line[k], mean[k]);
    });
    i &= -L;
    if (i + L > stop) return;
    write(i);
    each<K>([&](auto k) { line[k] = mean[k]; });
    for (i += L; i + L <= stop; i += L) write(i);
  });
  const int64_t rest = (last - first) % L;
  each<K>([&](auto k) {
    std::memcpy(out[k] + (last - first - rest), &line[k], size_t(rest) * sizeof(T));
  });
}

template <class T, int K>
void spread_to(const InstancePoolArgs& a, const Stripe& s, int64_t c) {
  T* out[K];
  int64_t r = 0;
  if (!a.rows) {
    bool aligned = true;
    for (int k = 0; k < K; ++k) {
      out[k] = at<T>(a.out, s.n, a.c0 + c + k, s.begin);
      aligned = aligned && reinterpret_cast<uintptr_t>(out[k]) % kVectorBytes == 0;
    }
    if (a.stream && aligned) {
      fill<true, T, K>(a, s, c, s.begin, s.end, r, out);
      stream_fence();
    } else {
      fill<false, T, K>(a, s, c, s.begin, s.end, r, out);
    }
    return;
  }
  alignas(64) T planes[K][kChunk], rows[K * kChunk];
  for (int k = 0; k < K; ++k) out[k] = planes[k];
  for (int64_t first = s.begin; first < s.end; first += kChunk) {
    const int64_t last = std::min(first + kChunk, s.end), length = last - first;
    fill<false, T, K>(a, s, c, first, last, r, out);
    for (int64_t i = 0; i < length; ++i) each<K>([&](auto k) { rows[i * K + k] = planes[k][i]; });
    T* to = at<T>(a.out, s.n, a.c0 + c, first);
    if (a.stream) stream_bytes(to, rows, K * length * int64_t(sizeof(T)));
    else std::memcpy(to, rows, size_t(K * length) * sizeof(T));
  }
  if (a.stream) stream_fence();
}

SMIS_BY_GROUPS(spread_planes, spread_to)

}  // namespace
}  // namespace smis::SMIS_ISA
