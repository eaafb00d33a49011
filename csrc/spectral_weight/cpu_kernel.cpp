// The loops of the spectrally normalised weight, over rows.
#include "spectral_weight/cpu_kernel.h"

#include <algorithm>
#include <vector>

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kBlock = 64;  // channels that are reordered at a time
constexpr int64_t kSum = 64;    // products that are summed in T: few lanes would lose digits of more

// (channel, tap) to (tap, channel) for n channels; S fixes the number of taps at compile time.
template <int S, class T>
inline void to_last(const T* __restrict from, T* __restrict to, int64_t n, int64_t taps, int64_t stride) {
  const int64_t k = S ? S : taps;
  for (int64_t s = 0; s < k; ++s)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[s * stride + i] = from[i * k + s];
}

template <int S, class T>
inline void from_last(const T* __restrict from, T* __restrict to, int64_t n, int64_t taps, int64_t stride) {
  const int64_t k = S ? S : taps;
  for (int64_t s = 0; s < k; ++s)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i * k + s] = from[s * stride + i];
}

// Calls fn(first, n, block) for blocks of a row's channels, where block(p) gives gradient values in
// the weight's order: the row itself, or kBlock channels brought back from channels-last.
template <int S, class T, class F>
inline void by_blocks(const SpectralWeightArgs& a, const T* grad, T* buffer, const F& fn) {
  if (!a.last) return fn(int64_t(0), a.inner * a.taps, grad);
  for (int64_t i = 0; i < a.inner; i += kBlock) {
    const int64_t n = std::min(kBlock, a.inner - i);
    from_last<S>(grad + i, buffer, n, a.taps, a.inner);
    fn(i * a.taps, n * a.taps, static_cast<const T*>(buffer));
  }
}

template <int S, class T> void forward(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  const int64_t row = a.inner * a.taps;
  const T sigma = T(a.sigma);
  std::vector<T> buffer(a.last ? size_t(kBlock * a.taps) : 0);
  for (int64_t o = begin; o < end; ++o) {
    const T* w = static_cast<const T*>(a.weight) + o * row;
    T* y = static_cast<T*>(a.out) + o * row;
    if (!a.last) {
#pragma omp simd
      for (int64_t j = 0; j < row; ++j) y[j] = w[j] / sigma;
      continue;
    }
    for (int64_t i = 0; i < a.inner; i += kBlock) {
      const int64_t n = std::min(kBlock, a.inner - i);
      to_last<S>(w + i * a.taps, buffer.data(), n, a.taps, kBlock);
      for (int64_t s = 0; s < a.taps; ++s)
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) y[s * a.inner + i + j] = buffer[s * kBlock + j] / sigma;
    }
  }
}

template <int S, class T> void dots(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  const int64_t row = a.inner * a.taps;
  std::vector<T> buffer(a.last ? size_t(kBlock * a.taps) : 0);
  for (int64_t o = begin; o < end; ++o) {
    const T* w = static_cast<const T*>(a.weight) + o * row;
    double total = 0;
    by_blocks<S>(a, static_cast<const T*>(a.grad) + o * row, buffer.data(),
                 [&](int64_t first, int64_t n, const T* g) {
      for (int64_t j = 0; j < n; j += kSum) {
        const int64_t end = std::min(n, j + kSum);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = j; k < end; ++k) sum += g[k] * w[first + k];
        total += double(sum);
      }
    });
    a.dots[o] = total;
  }
}

template <int S, class T> void backward(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  const int64_t row = a.inner * a.taps;
  const T scale = T(1 / a.sigma);
  const T* v = static_cast<const T*>(a.v);
  std::vector<T> buffer(a.last ? size_t(kBlock * a.taps) : 0);
  for (int64_t o = begin; o < end; ++o) {
    T* d = static_cast<T*>(a.d_weight) + o * row;
    const T outer = T(a.outer * double(static_cast<const T*>(a.u)[o]));
    by_blocks<S>(a, static_cast<const T*>(a.grad) + o * row, buffer.data(),
                 [&](int64_t first, int64_t n, const T* g) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) d[first + j] = g[j] * scale - outer * v[first + j];
    });
  }
}

// Calls fn<S, T> for the element type and the number of taps, 3x3 and 4x4 kernels apart.
#define SMIS_WITH_TAPS(fn)                                        \
  const auto run = [&](auto t) {                                  \
    using T = decltype(t);                                        \
    switch (a.taps) {                                             \
      case 9: return fn<9, T>(a, begin, end);                     \
      case 16: return fn<16, T>(a, begin, end);                   \
      default: return fn<0, T>(a, begin, end);                    \
    }                                                             \
  };                                                              \
  return a.element == Element::f64 ? run(double{}) : run(float{})

}  // namespace

void spectral_weight_kernel(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  SMIS_WITH_TAPS(forward);
}
void spectral_weight_dots_kernel(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  SMIS_WITH_TAPS(dots);
}
void spectral_weight_backward_kernel(const SpectralWeightArgs& a, int64_t begin, int64_t end) {
  SMIS_WITH_TAPS(backward);
}

}  // namespace smis::SMIS_ISA
