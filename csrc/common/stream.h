// Stores that pass the caches, for outputs that would not stay in them: no line is read to be
// overwritten, which saves a third of the traffic of a copy-like kernel.
#pragma once
#include "element.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace smis::SMIS_ISA {

// Any element type: 64 bytes (32 with AVX2) at a time once `dst` is aligned to them.
inline void stream_bytes(void* dst, const void* src, int64_t bytes) {
  auto* d = static_cast<unsigned char*>(dst);
  auto* s = static_cast<const unsigned char*>(src);
#if defined(__AVX2__)
#if defined(__AVX512F__)
  constexpr int64_t kWidth = 64;
#else
  constexpr int64_t kWidth = 32;
#endif
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(d) % kWidth);
  const int64_t head = misaligned ? (kWidth - misaligned < bytes ? kWidth - misaligned : bytes) : 0;
  std::memcpy(d, s, size_t(head));
  int64_t i = head;
  for (; i + kWidth <= bytes; i += kWidth) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(d + i), _mm512_loadu_si512(s + i));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i)));
#endif
  }
  std::memcpy(d + i, s + i, size_t(bytes - i));
#else
  std::memcpy(d, s, size_t(bytes));
#endif
}

inline void stream_out(float* d, const float* s, int64_t n) { stream_bytes(d, s, n * 4); }
inline void stream_out(double* d, const double* s, int64_t n) { stream_bytes(d, s, n * 8); }
template <class T> inline void stream_out(T* d, const float* s, int64_t n) { unstage(d, s, n); }

// Streamed stores are weakly ordered: call once before another thread may read them.
inline void stream_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace smis::SMIS_ISA
