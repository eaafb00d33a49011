// The loops of the spatially varying convolution. Every weight is read once; the input is staged
// into a zero-padded patch, so that no tap asks where the border is.
#include "spatially_varying_conv/cpu_kernel.h"

#include <algorithm>

#include "common/modulate.h"
#include "spatially_varying_conv/scratch.h"

namespace smis::SMIS_ISA {
namespace {

template <class A>
inline void multiply_add(const A* __restrict w, const A* __restrict x, A* __restrict sum,
                         int64_t n, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += w[i] * x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] += w[i] * x[i * stride];
  }
}

// sum[i * stride] += w[i] * g[i]
template <class A>
inline void scatter_add(const A* __restrict w, const A* __restrict g, A* __restrict sum, int64_t n,
                        int64_t stride) {
  if (stride == 1) {
    multiply_add(w, g, sum, n, 1);
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i * stride] += w[i] * g[i];
  }
}

template <class T>
void write_run(T* out, const Acc<T>* values, int64_t n, bool stream) {
  if (stream) stream_out(out, values, n);
  else if constexpr (__is_same(T, Acc<T>)) std::copy(values, values + n, out);
  else unstage(out, values, n);
}

// Output rows row0 .. row0 + rows of one plane, in plane layout.
struct RowBlock {
  int64_t n, g, row0, rows;
};
RowBlock row_block(const VaryingConvArgs& a, int64_t item) {
  const int64_t blocks = a.blocks(), plane = item / blocks, row0 = item % blocks * a.rows();
  return {plane / a.G, plane % a.G, row0, std::min(a.rows(), a.OH - row0)};
}

// The input behind a block, zeros outside the image.
template <class T>
void stage_patch(const VaryingConvArgs& a, const RowBlock& b, int64_t c, Acc<T>* patch) {
  using A = Acc<T>;
  const int64_t pitch = patch_pitch(a), count = patch_rows(a, b.rows);
  for (int64_t i = 0; i < count; ++i) {
    A* row = patch + i * pitch;
    const int64_t y = b.row0 * a.stride - a.padding + i;
    const int64_t left = std::min(a.padding, pitch), inside = std::min(a.W, pitch - left);
    if (y < 0 || y >= a.H) {
      std::fill(row, row + pitch, A(0));
      continue;
    }
    std::fill(row, row + left, A(0));
    const T* x = at<const T>(a.x, b.n, c, y * a.W);
    const A* values = staged(x, inside, row + left);
    if (values != row + left) std::copy(values, values + inside, row + left);
    std::fill(row + left + inside, row + pitch, A(0));
  }
}

template <class T> void forward_planes(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t pitch = patch_pitch(a), taps = a.taps();
  A* patch = static_cast<A*>(scratch);
  A* sum = patch + patch_rows(a, a.rows()) * pitch;
  A* staging = sum + a.rows() * a.OW;
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock b = row_block(a, item);
    const int64_t pixels = b.rows * a.OW, first = b.row0 * a.OW;
    for (int64_t c = b.g * a.per_group(); c < (b.g + 1) * a.per_group(); ++c) {
      stage_patch<T>(a, b, c, patch);
      std::fill(sum, sum + pixels, A(0));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const A* w = staged(at<const T>(a.w, b.n, b.g * taps + tap, first), pixels, staging);
        const A* x = patch + tap / a.K * a.dilation * pitch + tap % a.K * a.dilation;
        for (int64_t r = 0; r < b.rows; ++r)
          multiply_add(w + r * a.OW, x + r * a.stride * pitch, sum + r * a.OW, a.OW, a.stride);
      }
      write_run(at<T>(a.y, b.n, c, first), sum, pixels, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

template <class T>
void grad_weight_planes(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t pitch = patch_pitch(a), taps = a.taps(), most = a.rows() * a.OW;
  A* patch = static_cast<A*>(scratch);
  A* sums = patch + patch_rows(a, a.rows()) * pitch;
  A* staging = sums + taps * most;
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock b = row_block(a, item);
    const int64_t pixels = b.rows * a.OW, first = b.row0 * a.OW;
    std::fill(sums, sums + taps * most, A(0));
    for (int64_t c = b.g * a.per_group(); c < (b.g + 1) * a.per_group(); ++c) {
      stage_patch<T>(a, b, c, patch);
      const A* g = staged(at<const T>(a.y, b.n, c, first), pixels, staging);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const A* x = patch + tap / a.K * a.dilation * pitch + tap % a.K * a.dilation;
        for (int64_t r = 0; r < b.rows; ++r)
          multiply_add(g + r * a.OW, x + r * a.stride * pitch, sums + tap * most + r * a.OW, a.OW,
                       a.stride);
      }
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      write_run(at<T>(a.w, b.n, b.g * taps + tap, first), sums + tap * most, pixels, a.stream);
  }
  if (a.stream) stream_fence();
}

// begin..end counts planes (image, channel); a plane is summed in one padded buffer.
template <class T>
void grad_input_planes(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t pitch = patch_pitch(a), height = padded_rows(a), taps = a.taps();
  A* plane = static_cast<A*>(scratch);
  A* staging = plane + height * pitch;
  A* staging_g = staging + a.rows() * a.OW;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / a.C, c = item % a.C, g = c / a.per_group();
    std::fill(plane, plane + height * pitch, A(0));
    for (int64_t row0 = 0; row0 < a.OH; row0 += a.rows()) {
      const int64_t rows = std::min(a.rows(), a.OH - row0), pixels = rows * a.OW;
      const A* grad = staged(at<const T>(a.y, n, c, row0 * a.OW), pixels, staging_g);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const A* w = staged(at<const T>(a.w, n, g * taps + tap, row0 * a.OW), pixels, staging);
        A* sum = plane + (row0 * a.stride + tap / a.K * a.dilation) * pitch + tap % a.K * a.dilation;
        for (int64_t r = 0; r < rows; ++r)
          scatter_add(w + r * a.OW, grad + r * a.OW, sum + r * a.stride * pitch, a.OW, a.stride);
      }
    }
    for (int64_t y = 0; y < a.H; ++y)
      write_run(at<T>(a.x, n, c, y * a.W), plane + (y + a.padding) * pitch + a.padding, a.W, false);
  }
}

// A pixel's weights, (G, taps) in memory, as (taps, C).
template <class T>
void spread_taps(const VaryingConvArgs& a, const T* row, Acc<T>* wide, Acc<T>* staging) {
  using A = Acc<T>;
  const int64_t taps = a.taps(), each = a.per_group();
  const A* __restrict w = staged(row, a.G * taps, staging);
  for (int64_t tap = 0; tap < taps; ++tap) {
    A* __restrict out = wide + tap * a.C;
    if (each == 1) {
#pragma omp simd
      for (int64_t c = 0; c < a.C; ++c) out[c] = w[c * taps + tap];
    } else {
      for (int64_t g = 0; g < a.G; ++g) std::fill(out + g * each, out + (g + 1) * each, w[g * taps + tap]);
    }
  }
}

// The source pixel of (output pixel, tap) in image rows [y0, y1), or -1.
inline int64_t source(const VaryingConvArgs& a, int64_t oy, int64_t ox, int64_t tap, int64_t y0, int64_t y1) {
  const int64_t y = oy * a.stride - a.padding + tap / a.K * a.dilation;
  const int64_t x = ox * a.stride - a.padding + tap % a.K * a.dilation;
  return y < y0 || y >= y1 || x < 0 || x >= a.W ? -1 : y * a.W + x;
}

// begin..end counts output rows of all images.
template <class T> void forward_rows(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t taps = a.taps();
  A* wide = static_cast<A*>(scratch);
  A *sum = wide + taps * a.C, *zero = sum + a.C, *buffer = zero + a.C;
  A* staging = buffer + 2 * a.C;
  std::fill(zero, zero + a.C, A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / a.OH, oy = item % a.OH;
    for (int64_t ox = 0; ox < a.OW; ++ox) {
      const int64_t pixel = oy * a.OW + ox;
      spread_taps<T>(a, at<const T>(a.w, n, 0, pixel), wide, staging);
      std::fill(sum, sum + a.C, A(0));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t p = source(a, oy, ox, tap, 0, a.H);  // outside: NaN weights survive
        const A* x = p < 0 ? zero : staged(at<const T>(a.x, n, 0, p), a.C, buffer);
        multiply_add(wide + tap * a.C, x, sum, a.C, 1);
      }
      write_run(at<T>(a.y, n, 0, pixel), sum, a.C, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

template <class T>
void grad_weight_rows(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t taps = a.taps(), each = a.per_group();
  A* buffer = static_cast<A*>(scratch);
  A *zero = buffer + a.C, *staging = zero + a.C, *row = staging + a.C;
  std::fill(zero, zero + a.C, A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / a.OH, oy = item % a.OH;
    for (int64_t ox = 0; ox < a.OW; ++ox) {
      const int64_t pixel = oy * a.OW + ox;
      const A* __restrict g = staged(at<const T>(a.y, n, 0, pixel), a.C, buffer);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t p = source(a, oy, ox, tap, 0, a.H);
        const A* __restrict x = p < 0 ? zero : staged(at<const T>(a.x, n, 0, p), a.C, staging);
        if (each == 1) {
#pragma omp simd
          for (int64_t c = 0; c < a.C; ++c) row[c * taps + tap] = g[c] * x[c];
        } else {
          for (int64_t k = 0; k < a.G; ++k) {
            A s = 0;
            for (int64_t c = k * each; c < (k + 1) * each; ++c) s += g[c] * x[c];
            row[k * taps + tap] = s;
          }
        }
      }
      write_run(at<T>(a.w, n, 0, pixel), row, a.G * taps, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

// begin..end counts bands of input rows; outputs whose taps reach into a band are read for it.
template <class T>
void grad_input_rows(const VaryingConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t taps = a.taps(), height = a.band(), bands = (a.H + height - 1) / height;
  A* wide = static_cast<A*>(scratch);
  A *buffer = wide + taps * a.C, *staging = buffer + 4 * a.C;
  A* band = staging + a.G * taps;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / bands, y0 = item % bands * height, y1 = std::min(y0 + height, a.H);
    std::fill(band, band + (y1 - y0) * a.W * a.C, A(0));
    // y0 <= oy * stride - padding + tap row < y1
    const int64_t low = y0 + a.padding - a.reach(), high = y1 - 1 + a.padding;
    const int64_t from = low <= 0 ? 0 : (low + a.stride - 1) / a.stride;
    const int64_t to = std::min(a.OH, high / a.stride + 1);
    for (int64_t oy = from; oy < to; ++oy)
      for (int64_t ox = 0; ox < a.OW; ++ox) {
        const int64_t pixel = oy * a.OW + ox;
        spread_taps<T>(a, at<const T>(a.w, n, 0, pixel), wide, staging);
        const A* g = staged(at<const T>(a.y, n, 0, pixel), a.C, buffer);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t p = source(a, oy, ox, tap, y0, y1);
          if (p >= 0) multiply_add(wide + tap * a.C, g, band + (p - y0 * a.W) * a.C, a.C, 1);
        }
      }
    for (int64_t p = y0 * a.W; p < y1 * a.W; ++p)
      write_run(at<T>(a.x, n, 0, p), band + (p - y0 * a.W) * a.C, a.C, false);
  }
}

}  // namespace

SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_planes_kernel, VaryingConvArgs, forward_planes<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_rows_kernel, VaryingConvArgs, forward_rows<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_grad_weight_planes_kernel, VaryingConvArgs, grad_weight_planes<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_grad_weight_rows_kernel, VaryingConvArgs, grad_weight_rows<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_grad_input_planes_kernel, VaryingConvArgs, grad_input_planes<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(varying_conv_grad_input_rows_kernel, VaryingConvArgs, grad_input_rows<T>)

}  // namespace smis::SMIS_ISA
