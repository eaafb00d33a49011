// The loops of the conditional attention.
#include "conditional_attention/cpu_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/modulate.h"

namespace smis::SMIS_ISA {
namespace {

// exp(x) for x <= 0, to one unit in the last place; branch-free, so that loops vectorise.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN passes
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) + 127u) << 23);
}
inline double exp_negative(double x) { return std::exp(x); }

// sigmoid(s) and 1 - sigmoid(s), both without cancellation.
template <class A> struct Gate {
  A open, shut;
  explicit Gate(A s) {
    const A e = exp_negative(s < A(0) ? s : -s), large = A(1) / (A(1) + e), small = e * large;
    open = s < A(0) ? small : large;
    shut = s < A(0) ? large : small;
  }
};

template <class A>
inline void gate(const A* __restrict x, const A* __restrict s, A* __restrict y, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A z = x[i] * Gate<A>(s[i]).open;
    y[i] = z > A(0) ? z : z * slope;
  }
}

template <class A>
inline void gate_backward(const A* __restrict dy, const A* __restrict x, const A* __restrict s,
                          A* __restrict dx, A* __restrict ds, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Gate<A> g(s[i]);
    const A dz = (x[i] > A(0) ? dy[i] : dy[i] * slope) * g.open;
    dx[i] = dz;
    ds[i] = dz * x[i] * g.shut;
  }
}

template <class T> void forward(const ConditionalAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A xb[kChunk], sb[kChunk], yb[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t n = std::min(kChunk, end - i);
    T* y = static_cast<T*>(a.y) + i;
    A* out = a.stream ? yb : out_buffer(y, yb);
    gate(staged(static_cast<const T*>(a.x) + i, n, xb),
         staged(static_cast<const T*>(a.logits) + i, n, sb), out, A(a.slope), n);
    if (a.stream) stream_out(y, yb, n);
    else unstage(y, yb, n);
  }
  if (a.stream) stream_fence();
}

template <class T> void backward(const ConditionalAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A gb[kChunk], xb[kChunk], sb[kChunk], dxb[kChunk], dsb[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t n = std::min(kChunk, end - i);
    T *dx = static_cast<T*>(a.dx) + i, *ds = static_cast<T*>(a.dlogits) + i;
    gate_backward(staged(static_cast<const T*>(a.grad) + i, n, gb),
                  staged(static_cast<const T*>(a.x) + i, n, xb),
                  staged(static_cast<const T*>(a.logits) + i, n, sb), out_buffer(dx, dxb),
                  out_buffer(ds, dsb), A(a.slope), n);
    unstage(dx, dxb, n);
    unstage(ds, dsb, n);
  }
}

}  // namespace

SMIS_BY_ELEMENT(conditional_attention_kernel, ConditionalAttentionArgs, forward<T>)
SMIS_BY_ELEMENT(conditional_attention_backward_kernel, ConditionalAttentionArgs, backward<T>)

}  // namespace smis::SMIS_ISA
