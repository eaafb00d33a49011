// One pass over a conditioning tensor: an exact key where the vectors are one-hot (+ one more bit),
// else a 64-bit hash that verify_vectors_kernel checks against the chosen representatives.
#include "label_windows/cpu_kernel.h"

#include <algorithm>

#include "common/element.h"
#include "label_windows/keys.h"

namespace smis::SMIS_ISA {
namespace {

// (count, sum of k, sum of k^2) identifies a set of at most two channel numbers.
constexpr int kSumBits = 20, kSquareBits = 40;

inline uint64_t bits_of(float v) { return float_to_bits(v == 0 ? 0.f : v); }  // -0 equals 0
inline uint64_t bits_of(double v) {
  uint64_t u;
  v = v == 0 ? 0. : v;
  std::memcpy(&u, &v, 8);
  return u;
}

template <class T>
const T* pixels(const VectorKeysArgs& a, int64_t n, int64_t k, int64_t p) {
  return static_cast<const T*>(a.data) + n * a.stride_n + k * a.stride_k + p * a.stride_p;
}

// m values of one channel, gathered where pixels are not dense.
template <class T>
inline const Acc<T>* run(const VectorKeysArgs& a, int64_t n, int64_t k, int64_t p, int64_t m,
                         Acc<T>* buffer) {
  const T* x = pixels<T>(a, n, k, p);
  if (a.stride_p == 1) return staged(x, m, buffer);
  for (int64_t i = 0; i < m; ++i) buffer[i] = load(x[i * a.stride_p]);
  return buffer;
}

inline uint64_t exact_key(float count, float sum, float square) {
  return 1 + (uint64_t(count) << (kSumBits + kSquareBits) | uint64_t(sum) << kSquareBits |
              uint64_t(square));
}

template <class T> void exact_chunk(const VectorKeysArgs& a, int64_t n, int64_t p, int64_t m,
                                    uint64_t* keys, uint8_t& flag) {
  using A = Acc<T>;
  alignas(64) A buffer[kKeyChunk];
  // Channel numbers are small: sums and squares stay exact in fp32 up to 2^24.
  alignas(64) float count[kKeyChunk] = {}, sum[kKeyChunk] = {}, square[kKeyChunk] = {};
  int bad = 0, nan = 0;
  for (int64_t k = 0; k < a.K; ++k) {
    const A* x = run<T>(a, n, k, p, m, buffer);
    const float w = float(k), w2 = w * w;
#pragma omp simd reduction(| : bad, nan)
    for (int64_t i = 0; i < m; ++i) {
      const float one = x[i] != A(0) ? 1.f : 0.f;
      bad |= (x[i] != A(0)) & (x[i] != A(1));
      nan |= x[i] != x[i];
      count[i] += one;
      sum[i] += one * w;
      square[i] += one * w2;
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    bad |= count[i] > 2;
    keys[i] = exact_key(count[i], sum[i], square[i]);
  }
  flag = uint8_t((bad ? 1 : 0) | (nan ? 2 : 0));
}

// The same for channels-last memory: the channels of a pixel are dense, so they are the inner loop.
template <class T> void exact_rows(const VectorKeysArgs& a, int64_t n, int64_t p, int64_t m,
                                   uint64_t* keys, uint8_t& flag) {
  using A = Acc<T>;
  alignas(64) A buffer[kKeyChunk];  // holds a row: exact keys are for fewer channels
  int bad = 0, nan = 0;
  for (int64_t i = 0; i < m; ++i) {
    const A* x = staged(pixels<T>(a, n, 0, p + i), a.K, buffer);
    float count = 0, sum = 0, square = 0;
#pragma omp simd reduction(| : bad, nan) reduction(+ : count, sum, square)
    for (int64_t k = 0; k < a.K; ++k) {
      const float one = x[k] != A(0) ? 1.f : 0.f, w = float(k);
      bad |= (x[k] != A(0)) & (x[k] != A(1));
      nan |= x[k] != x[k];
      count += one;
      sum += one * w;
      square += one * w * w;
    }
    bad |= count > 2;
    keys[i] = exact_key(count, sum, square);
  }
  flag = uint8_t((bad ? 1 : 0) | (nan ? 2 : 0));
}

template <class T> void hash_chunk(const VectorKeysArgs& a, int64_t n, int64_t p, int64_t m,
                                   uint64_t* keys) {
  using A = Acc<T>;
  alignas(64) A buffer[kKeyChunk];
  std::fill(keys, keys + m, kHashSeed);
  for (int64_t k = 0; k < a.K; ++k) {
    const A* x = run<T>(a, n, k, p, m, buffer);
    for (int64_t i = 0; i < m; ++i) keys[i] = mix(keys[i], bits_of(x[i]));
  }
  for (int64_t i = 0; i < m; ++i) keys[i] |= 1;  // 0 marks an empty slot
}

template <class F> void chunks(const VectorKeysArgs& a, int64_t begin, int64_t end, F&& f) {
  const int64_t each = (a.P + kKeyChunk - 1) / kKeyChunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / each, p = i % each * kKeyChunk;
    f(n, p, std::min(kKeyChunk, a.P - p), a.flags[i]);
  }
}

template <class T> void vector_keys(const VectorKeysArgs& a, int64_t begin, int64_t end) {
  chunks(a, begin, end, [&](int64_t n, int64_t p, int64_t m, uint8_t& flag) {
    uint64_t* keys = a.keys + n * a.P + p;
    if (a.exact && a.stride_k == 1) exact_rows<T>(a, n, p, m, keys, flag);
    else if (a.exact) exact_chunk<T>(a, n, p, m, keys, flag);
    else hash_chunk<T>(a, n, p, m, keys);
  });
}

template <class T> void verify_vectors(const VectorKeysArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  chunks(a, begin, end, [&](int64_t n, int64_t p, int64_t m, uint8_t& flag) {
    alignas(64) A buffer[kKeyChunk];
    const int32_t* symbol = a.symbols + n * a.P + p;
    int bad = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const A* x = run<T>(a, n, k, p, m, buffer);
#pragma omp simd reduction(| : bad)
      for (int64_t i = 0; i < m; ++i) bad |= !(double(x[i]) == a.vectors[symbol[i] * a.K + k]);
    }
    flag = uint8_t(bad ? 1 : 0);
  });
}

}  // namespace

SMIS_BY_ELEMENT(vector_keys_kernel, VectorKeysArgs, vector_keys<T>)
SMIS_BY_ELEMENT(verify_vectors_kernel, VectorKeysArgs, verify_vectors<T>)

}  // namespace smis::SMIS_ISA
