// Modulation with gamma and beta gathered from a table that sits in cache: x is read once, y is
// written once. Backward adds dz * x-hat and dz into the table's rows, run by run of equal indices.
#include "indexed_modulation/cpu_kernel.h"

#include "common/modulate.h"

namespace smis::SMIS_ISA {
namespace {

template <class A> const A* table_of(const ModulationBranch& br) {
  return static_cast<const A*>(br.table);
}

// Output pixel q of the (up to four) that source pixel (h, w) feeds.
inline int64_t output_pixel(const ModulationArgs& a, int64_t h, int64_t w, int64_t q) {
  return a.upsample ? (2 * h + q / 2) * 2 * a.W + 2 * w + q % 2 : h * a.W + w;
}

template <Act act, class A>
inline void gather_run(const A* __restrict hat, const A* g, const A* b, const int32_t* index,
                       A* __restrict y, A slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    y[i] = activate<act>(hat[i] * (A(1) + g[index[i]]) + b[index[i]], slope);
}

template <class T> void apply_planes(const IndexedArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t up = a.upsample ? 2 : 1, P = a.H * a.W, step = kChunk / 2;
  alignas(64) A xb[kChunk], hat[kChunk], twice[kChunk], yb[kChunk];
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / a.C, c = plane % a.C;
    const int32_t* index = a.index + n * P * up * up;
    const int64_t run = a.upsample ? a.W : P;  // upsampling repeats whole rows
    for (int64_t p0 = 0; p0 < P; p0 += run)
      for (int64_t q = 0; q < run; q += step) {
        const int64_t m = std::min(step, run - q), p = p0 + q;
        const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const A *g = table_of<A>(br) + c * a.rows, *b = g + a.C * a.rows;
          hat_run(x, scalar_stats<A>(a, br, n, c), hat, m);
          if (a.upsample) duplicate(hat, twice, m);
          for (int64_t r = 0; r < up; ++r) {
            const int64_t o = a.upsample ? (2 * (p0 / a.W) + r) * 2 * a.W + 2 * q : p;
            T* y = at<T>(br.out, n, c, o);
            A* out = a.stream ? yb : out_buffer(y, yb);
            with_act(A(br.slope), [&](auto act) {
              gather_run<act()>(a.upsample ? twice : hat, g, b, index + o, out, A(br.slope),
                                m * up);
            });
            if (a.stream) stream_out(y, yb, m * up);
            else unstage(y, yb, m * up);
          }
        }
      }
  }
  if (a.stream) stream_fence();
}

template <class T> void apply_rows(const IndexedArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t up = a.upsample ? 2 : 1, pixels = a.H * a.W * up * up;
  alignas(64) A xb[kChunk], hat[kChunk], yb[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.H, h = i % a.H;
    const int32_t* index = a.index + n * pixels;
    for (int64_t w = 0; w < a.W; ++w)
      for (int64_t c = 0; c < a.C; c += kChunk) {
        const int64_t m = std::min(kChunk, a.C - c);
        const A* x = staged(at<const T>(a.x, n, c, h * a.W + w), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = channel_stats<A>(a, br, n, c);
          if (a.upsample) hat_run(x, s, hat, m);
          for (int64_t q = 0; q < up * up; ++q) {
            const int64_t o = output_pixel(a, h, w, q);
            const A* g = table_of<A>(br) + index[o] * 2 * a.C + c;
            T* y = at<T>(br.out, n, c, o);
            A* out = a.stream ? yb : out_buffer(y, yb);
            with_act(A(br.slope), [&](auto act) {
              if (a.upsample) apply_hat<act()>(hat, g, g + a.C, out, A(br.slope), m);
              else apply_run<act()>(x, s, g, g + a.C, out, A(br.slope), m);
            });
            if (a.stream) stream_out(y, yb, m);
            else unstage(y, yb, m);
          }
        }
      }
  }
  if (a.stream) stream_fence();
}

// Sums over one run of equal indices, flushed into the table's gradient where the index changes.
template <class A> struct RunSum {
  A *dgamma = nullptr, *dbeta = nullptr;  // of one channel
  int32_t row = -1;
  double gamma = 0, beta = 0;

  void flush() {
    if (row < 0) return;
    dgamma[row] += A(gamma);
    dbeta[row] += A(beta);
    gamma = beta = 0;
    row = -1;
  }
  void add(int32_t next, A dz, A hat) {
    if (next != row) flush();
    row = next;
    gamma += double(dz * hat);
    beta += double(dz);
  }
};

template <class T> void backward_planes(const IndexedArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t up = a.upsample ? 2 : 1, P = a.H * a.W, O = P * up * up;
  RunSum<A> runs[2];
  for (int64_t c = begin; c < end; ++c) {
    for (int k = 0; k < a.branches; ++k) {
      A* d = static_cast<A*>(a.branch[k].dtable) + c * a.rows;
      runs[k].dgamma = d;
      runs[k].dbeta = d + a.C * a.rows;
      std::fill(d, d + a.rows, A(0));
      std::fill(runs[k].dbeta, runs[k].dbeta + a.rows, A(0));
    }
    for (int64_t n = 0; n < a.N; ++n) {
      const int32_t* index = a.index + n * O;
      double sum = 0, product = 0;
      for (int64_t p = 0; p < P; ++p) {
        const A x = load(*at<const T>(a.x, n, c, p));
        A into = 0, hat = 0;
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = scalar_stats<A>(a, br, n, c);
          const A *g = table_of<A>(br) + c * a.rows, slope = A(br.slope);
          hat = s.hat(&x, 0);
          for (int64_t q = 0; q < up * up; ++q) {
            const int64_t o = output_pixel(a, p / a.W, p % a.W, q);
            const A dy = load(*at<const T>(br.grad, n, c, o));
            const A dz = load(*at<const T>(br.out, n, c, o)) > A(0) ? dy : dy * slope;
            runs[k].add(index[o], dz, hat);
            into += s.rstd * dz * (A(1) + g[index[o]]);
          }
        }
        store(*at<T>(a.dx, n, c, p), into);
        sum += into;
        product += into * hat;  // with batch statistics both branches share x-hat
      }
      if (a.sums != nullptr) {
        static_cast<A*>(a.sums)[n * a.C + c] = A(sum);
        static_cast<A*>(a.sums)[a.sums_stride + n * a.C + c] = A(product);
      }
    }
    for (int k = 0; k < a.branches; ++k) runs[k].flush();
  }
}

// The same for a run of channels; no run is longer than kRun, so that its fp32 sums stay exact enough.
constexpr int64_t kRun = 256;
template <class A> struct RunSums {
  alignas(64) A dgamma[kChunk], dbeta[kChunk];
  int32_t row = -1;
  A* table = nullptr;
  int64_t half = 0, m = 0, length = 0;

  void flush() {
    if (row < 0) return;
    length = 0;
    A *g = table + row * 2 * half, *b = g + half;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      g[j] += dgamma[j];
      b[j] += dbeta[j];
    }
    row = -1;
  }
  void start(int32_t next) {
    if (next == row && ++length < kRun) return;
    flush();
    row = next;
    std::fill(dgamma, dgamma + m, A(0));
    std::fill(dbeta, dbeta + m, A(0));
  }
};

template <class A, class S>
inline void accumulate_run(const A* __restrict dy, const A* __restrict out, const A* __restrict hat,
                           const S& s, const A* __restrict g, A* __restrict dgamma,
                           A* __restrict dbeta, A* __restrict into, A slope, bool add, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A dz = out[i] > A(0) ? dy[i] : dy[i] * slope;
    dbeta[i] += dz;
    dgamma[i] += dz * hat[i];
    const A partial = s.scale(i) * dz * (A(1) + g[i]);
    into[i] = add ? into[i] + partial : partial;
  }
}

template <class T> void backward_rows(const IndexedArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t up = a.upsample ? 2 : 1, O = a.H * a.W * up * up;
  alignas(64) A xb[kChunk], hat[kChunk], into[kChunk], dxb[kChunk], b0[kChunk], b1[kChunk];
  alignas(64) A s1[kChunk], s2[kChunk], line1[kChunk], line2[kChunk];
  RunSums<A> runs[2];
  for (int64_t c = begin; c < end; c += kChunk) {
    const int64_t m = std::min(kChunk, end - c);
    for (int k = 0; k < a.branches; ++k) {
      A* d = static_cast<A*>(a.branch[k].dtable) + c;
      for (int64_t r = 0; r < a.rows * 2; ++r) std::fill(d + r * a.C, d + r * a.C + m, A(0));
      runs[k].table = d;
      runs[k].half = a.C;
      runs[k].m = m;
    }
    for (int64_t n = 0; n < a.N; ++n) {
      const int32_t* index = a.index + n * O;
      std::fill(s1, s1 + m, A(0));
      std::fill(s2, s2 + m, A(0));
      std::fill(line1, line1 + m, A(0));
      std::fill(line2, line2 + m, A(0));
      for (int64_t p = 0; p < a.H * a.W; ++p) {
        const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = channel_stats<A>(a, br, n, c);
          hat_run(x, s, hat, m);
          for (int64_t q = 0; q < up * up; ++q) {
            const int64_t o = output_pixel(a, p / a.W, p % a.W, q);
            runs[k].start(index[o]);
            accumulate_run(staged(at<const T>(br.grad, n, c, o), m, b0),
                           staged(at<const T>(br.out, n, c, o), m, b1), hat, s,
                           table_of<A>(br) + index[o] * 2 * a.C + c, runs[k].dgamma,
                           runs[k].dbeta, into, A(br.slope), k > 0 || q > 0, m);
          }
        }
        T* dx = at<T>(a.dx, n, c, p);
        A* d = out_buffer(dx, dxb);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          d[j] = into[j];
          line1[j] += into[j];
          line2[j] += into[j] * hat[j];
        }
        unstage(dx, dxb, m);
        if ((p + 1) % a.W == 0) {  // sums of sums: fp32 stays exact enough
#pragma omp simd
          for (int64_t j = 0; j < m; ++j) {
            s1[j] += line1[j];
            s2[j] += line2[j];
            line1[j] = line2[j] = A(0);
          }
        }
      }
      if (a.sums != nullptr) {
        std::copy(s1, s1 + m, static_cast<A*>(a.sums) + n * a.C + c);
        std::copy(s2, s2 + m, static_cast<A*>(a.sums) + a.sums_stride + n * a.C + c);
      }
    }
    for (int k = 0; k < a.branches; ++k) runs[k].flush();
  }
}

}  // namespace

SMIS_BY_ELEMENT(indexed_planes_kernel, IndexedArgs, apply_planes<T>)
SMIS_BY_ELEMENT(indexed_rows_kernel, IndexedArgs, apply_rows<T>)
SMIS_BY_ELEMENT(indexed_backward_planes_kernel, IndexedArgs, backward_planes<T>)
SMIS_BY_ELEMENT(indexed_backward_rows_kernel, IndexedArgs, backward_rows<T>)

}  // namespace smis::SMIS_ISA
