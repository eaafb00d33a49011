// The loops of modulation. One pass: x is read once for both outputs and all four upsampled pixels.
#include "modulation/cpu_kernel.h"

#include "common/modulate.h"

namespace smis::SMIS_ISA {
namespace {

template <class T> void apply_planes(const ModulationArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t W = a.W, W2 = 2 * W;
  alignas(64) A xb[kChunk], hat[kChunk], twice[2 * kChunk];
  for (int64_t i = begin; i < end;) {
    const int64_t plane = i / a.H, h0 = i % a.H, rows = std::min(a.H - h0, end - i);
    const int64_t n = plane / a.C, c = plane % a.C;
    i += rows;
    if (!a.upsample) {
      const int64_t p0 = h0 * W, p1 = (h0 + rows) * W;
      for (int64_t p = p0; p < p1; p += kChunk) {
        const int64_t m = std::min(kChunk, p1 - p);
        const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          apply_branch<T>(x, scalar_stats<A>(a, br, n, c), at<const T>(br.gamma, n, c, p),
                          at<const T>(br.beta, n, c, p), at<T>(br.out, n, c, p), A(br.slope), m,
                          false, a.stream);
        }
      }
      continue;
    }
    for (int64_t h = h0; h < h0 + rows; ++h)
      for (int64_t w = 0; w < W; w += kChunk / 2) {
        const int64_t m = std::min(kChunk / 2, W - w);
        const A* x = staged(at<const T>(a.x, n, c, h * W + w), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = scalar_stats<A>(a, br, n, c);
          hat_run(x, s, hat, m);
          duplicate(hat, twice, m);
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t p = (2 * h + r) * W2 + 2 * w;
            apply_branch<T>(twice, s, at<const T>(br.gamma, n, c, p), at<const T>(br.beta, n, c, p),
                            at<T>(br.out, n, c, p), A(br.slope), 2 * m, true, a.stream);
          }
        }
      }
  }
  if (a.stream) stream_fence();
}

template <class T> void apply_rows(const ModulationArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t W = a.W, W2 = 2 * W;
  alignas(64) A xb[kChunk], hat[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.H, h = i % a.H;
    for (int64_t w = 0; w < W; ++w)
      for (int64_t c = 0; c < a.C; c += kChunk) {
        const int64_t m = std::min(kChunk, a.C - c);
        const A* x = staged(at<const T>(a.x, n, c, h * W + w), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = channel_stats<A>(a, br, n, c);
          if (!a.upsample) {
            const int64_t p = h * W + w;
            apply_branch<T>(x, s, at<const T>(br.gamma, n, c, p), at<const T>(br.beta, n, c, p),
                            at<T>(br.out, n, c, p), A(br.slope), m, false, a.stream);
            continue;
          }
          hat_run(x, s, hat, m);
          for (int64_t q = 0; q < 4; ++q) {
            const int64_t p = (2 * h + q / 2) * W2 + 2 * w + q % 2;
            apply_branch<T>(hat, s, at<const T>(br.gamma, n, c, p), at<const T>(br.beta, n, c, p),
                            at<T>(br.out, n, c, p), A(br.slope), m, true, a.stream);
          }
        }
      }
  }
  if (a.stream) stream_fence();
}

template <class T, class S>
inline void backward_branch(const ModulationBranch& br, const Acc<T>* hat, const S& s, int64_t n,
                            int64_t c, int64_t p, Acc<T>* into, bool accumulate, int64_t m) {
  using A = Acc<T>;
  alignas(64) A b0[kChunk], b1[kChunk], b2[kChunk], g0[kChunk], g1[kChunk];
  T *dgamma = at<T>(br.dgamma, n, c, p), *dbeta = at<T>(br.dbeta, n, c, p);
  backward_run(staged(at<const T>(br.grad, n, c, p), m, b0),
               staged(at<const T>(br.out, n, c, p), m, b1), hat, s,
               staged(at<const T>(br.gamma, n, c, p), m, b2), out_buffer(dgamma, g0),
               out_buffer(dbeta, g1), into, A(br.slope), accumulate, m);
  unstage(dgamma, g0, m);
  unstage(dbeta, g1, m);
}

template <class T> void backward_planes(const ModulationArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t W = a.W, P = a.H * W, W2 = 2 * W, half = kChunk / 2;
  alignas(64) A xb[kChunk], hat[kChunk], twice[kChunk], into[kChunk], wide[kChunk], dxb[kChunk];
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / a.C, c = plane % a.C;
    double sum = 0, product = 0;
    // Upsampling pairs whole rows; without it a plane is one run.
    const int64_t run = a.upsample ? W : P, step = a.upsample ? half : kChunk;
    for (int64_t p0 = 0; p0 < P; p0 += run)
      for (int64_t q = 0; q < run; q += step) {
        const int64_t m = std::min(step, run - q), p = p0 + q;
        const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = scalar_stats<A>(a, br, n, c);
          hat_run(x, s, hat, m);
          if (!a.upsample) {
            backward_branch<T>(br, hat, s, n, c, p, into, k > 0, m);
            continue;
          }
          duplicate(hat, twice, m);
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t h = p0 / W;
            backward_branch<T>(br, twice, s, n, c, (2 * h + r) * W2 + 2 * q, wide, r > 0, 2 * m);
          }
          for (int64_t i = 0; i < m; ++i) {
            const A both = wide[2 * i] + wide[2 * i + 1];
            into[i] = k > 0 ? into[i] + both : both;
          }
        }
        T* dx = at<T>(a.dx, n, c, p);
        A* d = out_buffer(dx, dxb);
        A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t i = 0; i < m; ++i) {
          d[i] = into[i];
          s1 += into[i];
          s2 += into[i] * hat[i];  // with batch statistics both branches share x-hat
        }
        unstage(dx, dxb, m);
        sum += s1;
        product += s2;
      }
    if (a.sums != nullptr) {
      static_cast<A*>(a.sums)[plane] = A(sum);
      static_cast<A*>(a.sums)[a.sums_stride + plane] = A(product);
    }
  }
}

// begin..end counts chunks of `chunk` source rows; each has its own partial sums (2, C).
template <class T> void backward_rows(const ModulationArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t W = a.W, W2 = 2 * W, chunks = (a.H + a.chunk - 1) / a.chunk;
  alignas(64) A xb[kChunk], hat[kChunk], into[kChunk], dxb[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / chunks, h0 = i % chunks * a.chunk, h1 = std::min(a.H, h0 + a.chunk);
    A* sums = a.sums == nullptr ? nullptr : static_cast<A*>(a.sums) + i * 2 * a.C;
    if (sums != nullptr) std::fill(sums, sums + 2 * a.C, A(0));
    for (int64_t p = h0 * W; p < h1 * W; ++p)
      for (int64_t c = 0; c < a.C; c += kChunk) {
        const int64_t m = std::min(kChunk, a.C - c);
        const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
        for (int k = 0; k < a.branches; ++k) {
          const auto& br = a.branch[k];
          const auto s = channel_stats<A>(a, br, n, c);
          hat_run(x, s, hat, m);
          if (!a.upsample) {
            backward_branch<T>(br, hat, s, n, c, p, into, k > 0, m);
            continue;
          }
          const int64_t h = p / W, w = p % W;
          for (int64_t q = 0; q < 4; ++q)
            backward_branch<T>(br, hat, s, n, c, (2 * h + q / 2) * W2 + 2 * w + q % 2, into,
                               k > 0 || q > 0, m);
        }
        T* dx = at<T>(a.dx, n, c, p);
        A* d = out_buffer(dx, dxb);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) d[j] = into[j];
        unstage(dx, dxb, m);
        if (sums != nullptr) {
          A *s1 = sums + c, *s2 = sums + a.C + c;
#pragma omp simd
          for (int64_t j = 0; j < m; ++j) {
            s1[j] += into[j];
            s2[j] += into[j] * hat[j];
          }
        }
      }
  }
}

// Mean and sum of squared deviations of so many values: parts merge without cancellation.
struct Moments {
  double count = 0, mean = 0, square = 0;
  // A part given by the sums r and q of the differences to a value near its mean and their squares.
  void add(double n, double near, double r, double q) {
    const double part = near + r / n, delta = part - mean, total = count + n;
    mean += delta * n / total;
    square += std::max(q - r * r / n, 0.0) + delta * delta * count * n / total;
    if (q != q) square = q;  // std::max drops NaN
    count = total;
  }
};

// Adds the differences of n values to `near`, and their squares. The sums of four are kept in fp32, of
// more in fp64: in a long chain behind an outlier every small square rounds the same way.
template <class A>
void add_deviations(const A* x, int64_t n, A near, double& sum, double& square) {
  constexpr int64_t kLanes = 64, kFour = 4;
  int64_t i = 0;
  for (; i + kFour * kLanes < n; i += kFour * kLanes) {
    double r = 0, q = 0;
#pragma omp simd reduction(+ : r, q)
    for (int64_t l = 0; l < kLanes; ++l) {
      A s = 0, t = 0;
      for (int64_t k = 0; k < kFour; ++k) {
        const A d = x[i + k * kLanes + l] - near;
        s += d;
        t += d * d;
      }
      r += double(s);
      q += double(t);
    }
    sum += r;
    square += q;
  }
  A s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
  for (int64_t j = i; j < n; ++j) {
    const A d = x[j] - near;
    s += d;
    t += d * d;
  }
  sum += double(s);
  square += double(t);
}

// Differences to the mean so far: those to a single sample would cancel where it is an outlier, as
// the corner of a plane that a padded conv made can be.
template <class T> void moments_planes(const MomentsArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A xb[kChunk];
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / a.C, c = plane % a.C;
    Moments total;
    for (int64_t p = 0; p < a.P; p += kChunk) {
      const int64_t m = std::min(kChunk, a.P - p);
      const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
      A near = A(total.mean);
      if (p == 0) {
        A s = 0;
        near = x[0];
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < m; ++i) s += x[i] - near;
        near += s / A(m);
      }
      double sum = 0, square = 0;
      add_deviations(x, m, near, sum, square);
      total.add(double(m), near, sum, square);
    }
    static_cast<A*>(a.mean)[plane] = A(total.mean);
    static_cast<A*>(a.var)[plane] = A(total.square / double(a.P));
  }
}

// Adds the differences of `count` pixels' channels to `near`, and their squares.
template <int count, class A>
inline void add_pixels(const A* const (&x)[count], const A* __restrict near, A* __restrict s,
                       A* __restrict q, int64_t m) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) {
    A sum = 0, square = 0;
    for (int k = 0; k < count; ++k) {
      const A d = x[k][j] - near[j];
      sum += d;
      square += d * d;
    }
    s[j] += sum;
    q[j] += square;
  }
}

// Each chunk of pixels leaves its mean and its sum of squared deviations, from the differences to
// the mean of its first pixels.
template <class T> void moments_rows(const MomentsArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t chunks = (a.P + a.chunk - 1) / a.chunk;
  constexpr int64_t kFirst = 128, kBlock = 16;  // a block's sums may stay in fp32
  alignas(64) A xb[4][kChunk], near[kChunk], s[kChunk], q[kChunk];
  alignas(64) double sum[kChunk], square[kChunk];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / chunks, p0 = i % chunks * a.chunk, p1 = std::min(a.P, p0 + a.chunk);
    for (int64_t c = 0; c < a.C; c += kChunk) {
      const int64_t m = std::min(kChunk, a.C - c);
      const auto pixel = [&](int64_t p, int k) {
        return staged(at<const T>(a.x, n, c, p), m, xb[k]);
      };
      const A* first = pixel(p0, 0);
      std::copy(first, first + m, near);
      std::fill(s, s + m, A(0));
      const int64_t some = std::min(p1 - p0, kFirst);
      for (int64_t p = p0; p < p0 + some; ++p) {
        const A* x = pixel(p, 0);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) s[j] += x[j] - near[j];
      }
      for (int64_t j = 0; j < m; ++j) near[j] += s[j] / A(some);
      std::fill(sum, sum + m, 0);
      std::fill(square, square + m, 0);
      for (int64_t block = p0; block < p1; block += kBlock) {
        std::fill(s, s + m, A(0));
        std::fill(q, q + m, A(0));
        const int64_t stop = std::min(p1, block + kBlock);
        int64_t p = block;
        for (; p + 4 <= stop; p += 4)
          add_pixels<4, A>({pixel(p, 0), pixel(p + 1, 1), pixel(p + 2, 2), pixel(p + 3, 3)}, near,
                           s, q, m);
        for (; p < stop; ++p) add_pixels<1, A>({pixel(p, 0)}, near, s, q, m);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          sum[j] += s[j];
          square[j] += q[j];
        }
      }
      double* out = a.partial + i * 2 * a.C + c;
      for (int64_t j = 0; j < m; ++j) {
        Moments part;
        part.add(double(p1 - p0), near[j], sum[j], square[j]);
        out[j] = part.mean;
        out[a.C + j] = part.square;
      }
    }
  }
}

// The chunks of an image and channel, in order.
template <class T> void moments_merge(const MomentsArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t chunks = (a.P + a.chunk - 1) / a.chunk;
  for (int64_t i = begin; i < end; ++i) {
    Moments total;
    for (int64_t k = 0; k < chunks; ++k) {
      const double* part = a.partial + (i / a.C * chunks + k) * 2 * a.C + i % a.C;
      const double n = double(std::min(a.chunk, a.P - k * a.chunk));
      total.add(n, part[0], 0, part[a.C]);
    }
    static_cast<A*>(a.mean)[i] = A(total.mean);
    static_cast<A*>(a.var)[i] = A(total.square / double(a.P));
  }
}

template <class A, class S>
inline void center_run(const A* __restrict g, const A* __restrict x, const S& s,
                       const A* shift, const A* scale, int64_t step, A* __restrict d, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    d[i] = g[i] - shift[i * step] - s.hat(x, i) * scale[i * step];
}

template <class T, bool planes> void center(const CenterArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A gb[kChunk], xb[kChunk], db[kChunk];
  const int64_t length = planes ? a.P : a.C;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = planes ? i / a.C : i / a.P;
    for (int64_t j = 0; j < length; j += kChunk) {
      const int64_t m = std::min(kChunk, length - j);
      const int64_t c = planes ? i % a.C : j, p = planes ? j : i % a.P;
      const int64_t at_stat = (a.stat_n ? n : 0) * a.C + c;
      const A* g = staged(at<const T>(a.grad, n, c, p), m, gb);
      const A* x = staged(at<const T>(a.x, n, c, p), m, xb);
      T* dx = at<T>(a.dx, n, c, p);
      A* d = out_buffer(dx, db);
      const A *mean = static_cast<const A*>(a.mean) + at_stat,
              *rstd = static_cast<const A*>(a.rstd) + at_stat,
              *shift = static_cast<const A*>(a.shift) + at_stat,
              *scale = static_cast<const A*>(a.scale) + at_stat;
      if constexpr (planes) center_run(g, x, Scalar<A>{*mean, *rstd}, shift, scale, 0, d, m);
      else center_run(g, x, PerChannel<A>{mean, rstd}, shift, scale, 1, d, m);
      unstage(dx, db, m);
    }
  }
}

}  // namespace

SMIS_BY_ELEMENT(modulation_planes_kernel, ModulationArgs, apply_planes<T>)
SMIS_BY_ELEMENT(modulation_rows_kernel, ModulationArgs, apply_rows<T>)
SMIS_BY_ELEMENT(modulation_backward_planes_kernel, ModulationArgs, backward_planes<T>)
SMIS_BY_ELEMENT(modulation_backward_rows_kernel, ModulationArgs, backward_rows<T>)
SMIS_BY_ELEMENT(moments_planes_kernel, MomentsArgs, moments_planes<T>)
SMIS_BY_ELEMENT(moments_rows_kernel, MomentsArgs, moments_rows<T>)
SMIS_BY_ELEMENT(moments_merge_kernel, MomentsArgs, moments_merge<T>)
SMIS_BY_ELEMENT(center_planes_kernel, CenterArgs, center<T, true>)
SMIS_BY_ELEMENT(center_rows_kernel, CenterArgs, center<T, false>)

}  // namespace smis::SMIS_ISA
