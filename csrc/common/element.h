// 16-bit storage types and their staging through fp32 buffers, for the per-instruction-set files.
// Everything lies in the namespace of the set, so that no copy of one set is linked into another.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace smis::SMIS_ISA {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(BFloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float load(Half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, mag = v.bits & 0x7fff;
  if (mag >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (mag & 0x3ff) << 13);
  // 2^112 rebases the exponent and normalises subnormals in one multiplication.
  return bits_to_float(sign | float_to_bits(bits_to_float(mag << 13) * 0x1p112f));
#endif
}

inline void store(float& d, float v) { d = v; }
inline void store(double& d, double v) { d = v; }
inline void store(BFloat16& d, float v) {
  const uint32_t u = float_to_bits(v);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest even
  d.bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t(u >> 16 | 0x40) : uint16_t(rounded);
}
inline void store(Half& d, float v) {
#if defined(__F16C__)
  d.bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = float_to_bits(v), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  uint32_t h;
  if (mag > 0x7f800000) h = 0x7e00;
  else if (mag >= 0x477ff000) h = 0x7c00;
  else if (mag < 0x38800000)
    h = float_to_bits(bits_to_float(mag) + 0.5f) - 0x3f000000;  // the adder rounds subnormals
  else h = (mag - 0x38000000 + 0xfff + ((mag >> 13) & 1)) >> 13;
  d.bits = uint16_t(sign | h);
#endif
}

// n values as the accumulation type: the row itself where no conversion is needed, else `buffer`.
inline const float* staged(const float* p, int64_t, float*) { return p; }
inline const double* staged(const double* p, int64_t, double*) { return p; }
template <class T>
inline const float* staged(const T* p, int64_t n, float* buffer) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == sizeof(Half) && __is_same(T, Half))
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
#endif
  for (; i < n; ++i) buffer[i] = load(p[i]);
  return buffer;
}

// Where to write n results: the row itself, or a buffer that `unstage` then converts.
inline float* out_buffer(float* p, float*) { return p; }
inline double* out_buffer(double* p, double*) { return p; }
template <class T> inline float* out_buffer(T*, float* buffer) { return buffer; }
inline void unstage(float*, const float*, int64_t) {}
inline void unstage(double*, const double*, int64_t) {}
template <class T>
inline void unstage(T* p, const float* buffer, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(T, Half))
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(p + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) store(p[i], buffer[i]);
}

// Calls fn(T{}) with the storage type that `e` names.
template <class F>
inline void with_element(Element e, F&& fn) {
  switch (e) {
    case Element::f32: return fn(float{});
    case Element::f64: return fn(double{});
    case Element::f16: return fn(Half{});
    case Element::bf16: return fn(BFloat16{});
  }
}

// The kernel `name`, by its `call`, in which T is the storage type that the arguments name.
#define SMIS_BY_ELEMENT(name, Args, ...)                                                          \
  void name(const Args& a, int64_t begin, int64_t end) {                                          \
    with_element(a.element, [&](auto t) { using T = decltype(t); __VA_ARGS__(a, begin, end); });  \
  }
#define SMIS_BY_ELEMENT_WITH_SCRATCH(name, Args, ...)                                             \
  void name(const Args& a, int64_t begin, int64_t end, void* scratch) {                           \
    with_element(a.element, [&](auto t) {                                                         \
      using T = decltype(t);                                                                      \
      __VA_ARGS__(a, begin, end, scratch);                                                        \
    });                                                                                           \
  }

}  // namespace smis::SMIS_ISA
