// The loops of norm_act: act(x-hat) + residual in one pass; modulation without gamma and beta.
#include "norm_act/cpu_kernel.h"

#include "common/modulate.h"

namespace smis::SMIS_ISA {
namespace {

template <Act act, bool add, class A, class S>
inline void apply_run(const A* __restrict x, const S& s, const A* __restrict r, A* __restrict y,
                      A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A z = activate<act>(s.hat(x, i), slope);
    y[i] = add ? z + r[i] : z;
  }
}

// n <= kChunk elements whose statistics are `s`.
template <class T, class S>
inline void apply(const NormActArgs& a, const S& s, int64_t n, int64_t c, int64_t p, int64_t m) {
  using A = Acc<T>;
  alignas(64) A xb[kChunk], rb[kChunk], yb[kChunk];
  const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
  const bool add = a.residual.data != nullptr;
  const A* r = add ? staged(at<const T>(a.residual, n, c, p), m, rb) : nullptr;
  T* y = at<T>(a.out, n, c, p);
  A* out = a.stream ? yb : out_buffer(y, yb);
  with_act(A(a.slope), [&](auto act) {
    if (add) apply_run<act(), true>(x, s, r, out, A(a.slope), m);
    else apply_run<act(), false>(x, s, r, out, A(a.slope), m);
  });
  if (a.stream) stream_out(y, yb, m);
  else unstage(y, yb, m);
}

template <class T> Scalar<Acc<T>> plane_stats(const NormActArgs& a, int64_t n, int64_t c) {
  const int64_t i = (a.stat_n ? n : 0) * a.C + c;
  return {static_cast<const Acc<T>*>(a.mean)[i], static_cast<const Acc<T>*>(a.rstd)[i]};
}
template <class T> PerChannel<Acc<T>> row_stats(const NormActArgs& a, int64_t n, int64_t c) {
  const int64_t i = (a.stat_n ? n : 0) * a.C + c;
  return {static_cast<const Acc<T>*>(a.mean) + i, static_cast<const Acc<T>*>(a.rstd) + i};
}

template <class T> void planes(const NormActArgs& a, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / a.C, c = plane % a.C;
    const auto s = plane_stats<T>(a, n, c);
    for (int64_t p = 0; p < a.P; p += kChunk) apply<T>(a, s, n, c, p, std::min(kChunk, a.P - p));
  }
  if (a.stream) stream_fence();
}

template <class T> void rows(const NormActArgs& a, int64_t begin, int64_t end) {
  const int64_t chunks = (a.P + a.chunk - 1) / a.chunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / chunks, p0 = i % chunks * a.chunk, p1 = std::min(a.P, p0 + a.chunk);
    for (int64_t c = 0; c < a.C; c += kChunk) {
      const auto s = row_stats<T>(a, n, c);
      for (int64_t p = p0; p < p1; ++p) apply<T>(a, s, n, c, p, std::min(kChunk, a.C - c));
    }
  }
  if (a.stream) stream_fence();
}

// rstd * dz of n elements. The sign of x-hat decides the slope, so that no output is kept.
template <class A, class S>
inline void backward_run(const A* __restrict dy, const A* __restrict hat, const S& s,
                         A* __restrict dx, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] = s.scale(i) * (hat[i] > A(0) ? dy[i] : dy[i] * slope);
}

template <class T, class S>
inline void backward(const NormActArgs& a, const S& s, int64_t n, int64_t c, int64_t p, int64_t m,
                     Acc<T>* hat, Acc<T>* kept) {
  using A = Acc<T>;
  alignas(64) A xb[kChunk], gb[kChunk];
  hat_run(staged(at<const T>(a.x, n, c, p), m, xb), s, hat, m);
  backward_run(staged(at<const T>(a.grad, n, c, p), m, gb), hat, s, kept, A(a.slope), m);
  T* dx = at<T>(a.out, n, c, p);
  if constexpr (sizeof(T) < sizeof(A)) unstage(dx, kept, m);
  else std::copy(kept, kept + m, dx);
}

template <class T> void backward_planes(const NormActArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A hat[kChunk], kept[kChunk];
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / a.C, c = plane % a.C;
    const auto s = plane_stats<T>(a, n, c);
    double sum = 0, product = 0;
    for (int64_t p = 0; p < a.P; p += kChunk) {
      const int64_t m = std::min(kChunk, a.P - p);
      backward<T>(a, s, n, c, p, m, hat, kept);
      A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
      for (int64_t i = 0; i < m; ++i) {
        s1 += kept[i];
        s2 += kept[i] * hat[i];
      }
      sum += s1;
      product += s2;
    }
    if (a.sums == nullptr) continue;
    static_cast<A*>(a.sums)[plane] = A(sum);
    static_cast<A*>(a.sums)[a.sums_stride + plane] = A(product);
  }
}

template <class T> void backward_rows(const NormActArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t chunks = (a.P + a.chunk - 1) / a.chunk;
  alignas(64) A hat[kChunk], kept[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / chunks, p0 = i % chunks * a.chunk, p1 = std::min(a.P, p0 + a.chunk);
    A* sums = a.sums == nullptr ? nullptr : static_cast<A*>(a.sums) + i * 2 * a.C;
    if (sums != nullptr) std::fill(sums, sums + 2 * a.C, A(0));
    for (int64_t c = 0; c < a.C; c += kChunk) {
      const int64_t m = std::min(kChunk, a.C - c);
      const auto s = row_stats<T>(a, n, c);
      for (int64_t p = p0; p < p1; ++p) {
        backward<T>(a, s, n, c, p, m, hat, kept);
        if (sums == nullptr) continue;
        A *s1 = sums + c, *s2 = sums + a.C + c;
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          s1[j] += kept[j];
          s2[j] += kept[j] * hat[j];
        }
      }
    }
  }
}

}  // namespace

SMIS_BY_ELEMENT(norm_act_planes_kernel, NormActArgs, planes<T>)
SMIS_BY_ELEMENT(norm_act_rows_kernel, NormActArgs, rows<T>)
SMIS_BY_ELEMENT(norm_act_backward_planes_kernel, NormActArgs, backward_planes<T>)
SMIS_BY_ELEMENT(norm_act_backward_rows_kernel, NormActArgs, backward_rows<T>)

}  // namespace smis::SMIS_ISA
