// The loops that dense and indexed modulation share, in the namespace of the instruction set.
#pragma once
#include <algorithm>
#include <type_traits>

#include "element.h"
#include "modulate_args.h"
#include "stream.h"

namespace smis::SMIS_ISA {

constexpr int64_t kChunk = 1024;  // elements staged at a time: a few rows fit L1 together

// Statistics of one channel run: a scalar in plane layout, one value per element in row layout.
template <class A> struct Scalar {
  A mean, rstd;
  A hat(const A* x, int64_t i) const { return (x[i] - mean) * rstd; }
  A scale(int64_t) const { return rstd; }
};
template <class A> struct PerChannel {
  const A *mean, *rstd;
  A hat(const A* x, int64_t i) const { return (x[i] - mean[i]) * rstd[i]; }
  A scale(int64_t i) const { return rstd[i]; }
};

enum class Act { none, relu, leaky };
template <class A> Act act_of(A slope) {
  return slope == A(1) ? Act::none : slope == A(0) ? Act::relu : Act::leaky;
}
// Written so that NaN passes: it is not below zero.
template <Act act, class A> inline A activate(A z, A slope) {
  if constexpr (act == Act::none) return z;
  if constexpr (act == Act::relu) return z < A(0) ? A(0) : z;
  return z < A(0) ? z * slope : z;
}

template <Act act, class A>
inline void apply_hat(const A* __restrict hat, const A* __restrict g, const A* __restrict b,
                      A* __restrict y, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = activate<act>(hat[i] * (A(1) + g[i]) + b[i], slope);
}

template <Act act, class A, class S>
inline void apply_run(const A* __restrict x, const S& s, const A* __restrict g,
                      const A* __restrict b, A* __restrict y, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    y[i] = activate<act>(s.hat(x, i) * (A(1) + g[i]) + b[i], slope);
}

// Calls f(integral_constant<Act>) for the activation of this slope.
template <class A, class F> inline void with_act(A slope, F&& f) {
  switch (act_of(slope)) {
    case Act::none: return f(std::integral_constant<Act, Act::none>{});
    case Act::relu: return f(std::integral_constant<Act, Act::relu>{});
    case Act::leaky: return f(std::integral_constant<Act, Act::leaky>{});
  }
}

// One run of n <= kChunk elements through one branch, staging 16-bit types.
template <class T, class S>
inline void apply_branch(const Acc<T>* x, const S& s, const T* g, const T* b, T* y, Acc<T> slope,
                         int64_t n, bool hat_given, bool stream) {
  using A = Acc<T>;
  alignas(64) A gb[kChunk], bb[kChunk], yb[kChunk];
  const A* gs = staged(g, n, gb);
  const A* bs = staged(b, n, bb);
  A* out = stream ? yb : out_buffer(y, yb);
  with_act(slope, [&](auto act) {
    if (hat_given) apply_hat<act()>(x, gs, bs, out, slope, n);
    else apply_run<act()>(x, s, gs, bs, out, slope, n);
  });
  if (stream) stream_out(y, yb, n);
  else unstage(y, yb, n);
}

template <class A, class S>
inline void hat_run(const A* __restrict x, const S& s, A* __restrict hat, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) hat[i] = s.hat(x, i);
}

template <class A>
inline void duplicate(const A* __restrict x, A* __restrict twice, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) twice[2 * i] = twice[2 * i + 1] = x[i];
}

template <class A>
Scalar<A> scalar_stats(const ModulationArgs& a, const ModulationBranch& br, int64_t n, int64_t c) {
  const int64_t i = (br.stat_n ? n : 0) * a.C + c;
  return {static_cast<const A*>(br.mean)[i], static_cast<const A*>(br.rstd)[i]};
}
template <class A>
PerChannel<A> channel_stats(const ModulationArgs& a, const ModulationBranch& br, int64_t n, int64_t c) {
  const int64_t i = (br.stat_n ? n : 0) * a.C + c;
  return {static_cast<const A*>(br.mean) + i, static_cast<const A*>(br.rstd) + i};
}

// dz, dgamma, dbeta of n elements; adds rstd * dz * (1 + gamma) to `into`.
template <class A, class S>
inline void backward_run(const A* __restrict dy, const A* __restrict out, const A* __restrict hat,
                         const S& s, const A* __restrict g, A* __restrict dgamma,
                         A* __restrict dbeta, A* __restrict into, A slope, bool accumulate,
                         int64_t n) {
  const A keep = accumulate ? A(1) : A(0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A dz = out[i] > A(0) ? dy[i] : dy[i] * slope;
    dbeta[i] = dz;
    dgamma[i] = dz * hat[i];
    const A partial = s.scale(i) * dz * (A(1) + g[i]);
    into[i] = keep == A(0) ? partial : into[i] + partial;
  }
}

}  // namespace smis::SMIS_ISA
