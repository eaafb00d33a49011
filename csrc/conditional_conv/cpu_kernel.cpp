// Predict a tile's kernels in cache, apply them, forget them. See cpu_kernel.h for the layout.
#include "conditional_conv/cpu_kernel.h"

#include <algorithm>

#include "common/lanes.h"
#include "common/modulate.h"
#include "common/winograd.h"
#include "conditional_conv/scratch.h"

namespace smis::SMIS_ISA {
namespace {

// Where a region lies; its patch starts one pixel up and left of its first pixel.
struct Region {
  int64_t n, y0, x0;
};
Region region_at(const Tiling& t, int64_t i) {
  const int64_t n = i / (t.across * t.down), j = i % (t.across * t.down);
  return {n, j / t.across * t.rows * t.side - 1, j % t.across * t.cols * t.side - 1};
}

// Channels [c0, c0 + count) of the patch of a region as (pixels, width), zeros outside.
template <class T>
void stage_patch(const Tiling& t, const Operand& o, const Region& r, int64_t c0, int64_t count,
                 int64_t width, Acc<T>* patch) {
  const int64_t PW = t.patch_width();
  std::fill(patch, patch + t.patch_pixels() * width, Acc<T>(0));
  const int64_t j0 = std::max<int64_t>(0, -r.x0), j1 = std::min(PW, t.W - r.x0);
  for (int64_t i = 0; i < t.patch_height(); ++i) {
    const int64_t y = r.y0 + i;
    if (y < 0 || y >= t.H) continue;
    const T* row = at<const T>(o, r.n, c0, y * t.W + r.x0);
    Acc<T>* out = patch + i * PW * width;
    if (o.c == 1) {
      for (int64_t j = j0; j < j1; ++j) {
        const Acc<T>* values = staged(row + j * o.p, count, out + j * width);
        if (values != out + j * width) std::copy(values, values + count, out + j * width);
      }
    } else {
      for (int64_t c = 0; c < count; c += 16) {
        const int64_t some = std::min<int64_t>(16, count - c);
        for (int64_t j = j0; j < j1; ++j)
          for (int64_t l = c; l < c + some; ++l) out[j * width + l] = load(row[l * o.c + j * o.p]);
      }
    }
  }
}

// Adds channels [c0, c0 + count) of a patch to the image.
template <class A>
void add_patch(const Tiling& t, const Operand& o, const Region& r, int64_t c0, int64_t count,
               int64_t width, const A* patch) {
  const int64_t PW = t.patch_width();
  const int64_t j0 = std::max<int64_t>(0, -r.x0), j1 = std::min(PW, t.W - r.x0);
  for (int64_t i = 0; i < t.patch_height(); ++i) {
    const int64_t y = r.y0 + i;
    if (y < 0 || y >= t.H) continue;
    A* row = at<A>(o, r.n, c0, y * t.W + r.x0);
    const A* in = patch + i * PW * width;
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t l = 0; l < count; ++l) row[l * o.c + j * o.p] += in[j * width + l];
  }
}

template <class T, int m>
void transform_condition(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int side = m + 2, frequencies = side * side;
  constexpr int64_t L = Lanes<A>::n;
  const Tiling& t = a.tiling;
  const int64_t depth = a.depth(), PW = t.patch_width(), plane = a.v_plane();
  A* patch = static_cast<A*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    stage_patch<T>(t, a.h, region_at(t, a.first + i), 0, a.D, depth, patch);
    A* v = static_cast<A*>(a.v) + i * a.transformed();
    for (int64_t tile = 0; tile < t.tiles; ++tile)
      for (int64_t k = 0; k < depth; k += L) {
        V d[frequencies] = {}, out[frequencies];
        if (tile < t.rows * t.cols) {
          const A* corner = patch + (tile / t.cols * m * PW + tile % t.cols * m) * depth + k;
#pragma GCC unroll 36
          for (int f = 0; f < frequencies; ++f)
            d[f] = get(corner + (f / side * PW + f % side) * depth);
        }
        Winograd<V, m>::input(d, out);
#pragma GCC unroll 36
        for (int f = 0; f < frequencies; ++f) put(v + f * plane + tile * depth + k, out[f]);
      }
  }
}

// One block of channels.
template <class T> struct Block {
  static constexpr int64_t L = Lanes<Acc<T>>::n;
  int64_t channel, lanes;
  Block(const ConditionalConvArgs& a, int64_t i)
      : channel(i * L), lanes(std::min(L, a.C - i * L)) {}
};

// Kernels [k, k + L) of one row of weights, zeros after the last: in place, or a copy in `buffer`.
template <class T>
const Acc<T>* some_kernels(const ConditionalConvArgs& a, int64_t row, int64_t k, Acc<T>* buffer) {
  constexpr int64_t L = Block<T>::L;
  const T* weight = static_cast<const T*>(a.weight) + (row * a.D + k) * 9;
  const int64_t count = std::min(L, a.D - k) * 9;
  if (count == 9 * L) return staged(weight, count, buffer);
  for (int64_t i = 0; i < 9 * L; ++i) buffer[i] = i < count ? load(weight[i]) : Acc<T>(0);
  return buffer;
}

// The block's weights as u[row][f][k][tap][lane]; row and tap are those of the predicted kernel.
template <class T, int m = 2>
void transform_weights(const ConditionalConvArgs& a, const Block<T>& b, Acc<T>* u) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n, frequencies = (m + 2) * (m + 2);
  const int64_t depth = a.depth(), plane = a.u_plane(L);
  alignas(kVectorBytes) A buffer[L][9 * L];
  V g[9 * L];
  for (int64_t kk = 0; kk < 9; ++kk)
    for (int64_t k = 0; k < depth; k += L) {
      const A* rows[L];
      for (int64_t l = 0; l < L; ++l) {
        if (l < b.lanes && k < a.D) {
          rows[l] = some_kernels<T>(a, (b.channel + l) * 9 + kk, k, buffer[l]);
        } else {
          std::fill(buffer[l], buffer[l] + 9 * L, A(0));
          rows[l] = buffer[l];
        }
      }
      for (int64_t i = 0; i < 9 * L; i += L) {
        for (int64_t l = 0; l < L; ++l) g[i + l] = get(rows[l] + i);
        transpose<A>(g + i);
      }
      for (int64_t j = 0; j < L; ++j) {
        V out[frequencies];
        Winograd<V, m>::weight(g + 9 * j, out);
#pragma GCC unroll 36
        for (int64_t f = 0; f < frequencies; ++f)
          put(u + (kk / 3 * frequencies + f) * plane + ((k + j) * kTaps + kk % 3) * L, out[f]);
      }
    }
}

// The same weights as u[row][f][tap][lane][k].
template <class T> void transform_weights_transposed(const ConditionalConvArgs& a, const Block<T>& b, Acc<T>* u) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  const int64_t depth = a.depth(), plane = a.u_plane(L);
  for (int64_t kk = 0; kk < 9; ++kk)
    for (int64_t l = 0; l < L; ++l)
      for (int64_t k = 0; k < depth; k += L) {
        alignas(kVectorBytes) A buffer[9 * L], g[9 * L] = {};
        if (l < b.lanes && k < a.D) {
          const A* row = some_kernels<T>(a, (b.channel + l) * 9 + kk, k, buffer);
          for (int64_t j = 0; j < L; ++j)
            for (int64_t i = 0; i < 9; ++i) g[i * L + j] = row[j * 9 + i];
        }
        V taps[9], out[16];
        for (int i = 0; i < 9; ++i) taps[i] = get(g + i * L);
        Winograd<V>::weight(taps, out);
        for (int64_t f = 0; f < 16; ++f)
          put(u + (kk / 3 * 16 + f) * plane + (kk % 3 * L + l) * depth + k, out[f]);
      }
}

// m[f][tile][tap][lane]: the transformed kernels of one kernel row, for all tiles of a region.
template <class A>
void predict(const ConditionalConvArgs& a, const A* v, const A* u, A* m) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t depth = a.depth(), tiles = a.tiling.tiles;
  for (int64_t f = 0; f < a.tiling.frequencies(); ++f)
    for (int64_t tile = 0; tile < tiles; tile += kTileRows)
      product_tile<A, int(kTaps), false>(v + f * a.v_plane() + tile * depth, depth, 1,
                                         u + f * a.u_plane(L), kTaps * L, depth,
                                         m + f * a.m_plane(L) + tile * kTaps * L, kTaps * L);
}

// The predicted kernels of a tile's m x m pixels at one tap.
template <class A, int m = 2>
inline void kernels_of(const ConditionalConvArgs& a, const A* products, int64_t tile, int64_t tap,
                       Vec<A> bias, Vec<A>* w) {
  constexpr int64_t L = Lanes<A>::n, frequencies = (m + 2) * (m + 2);
  Vec<A> in[frequencies];
#pragma GCC unroll 36
  for (int f = 0; f < frequencies; ++f)
    in[f] = get(products + f * a.m_plane(L) + (tile * kTaps + tap) * L);
  Winograd<Vec<A>, m>::output(in, w);
#pragma GCC unroll 16
  for (int q = 0; q < m * m; ++q) w[q] += bias;
}

template <class T> Vec<Acc<T>> bias_of(const ConditionalConvArgs& a, const Block<T>& b, int64_t kk) {
  constexpr int64_t L = Block<T>::L;
  alignas(kVectorBytes) Acc<T> bias[L] = {};
  if (a.bias != nullptr)
    for (int64_t l = 0; l < b.lanes; ++l)
      bias[l] = load(static_cast<const T*>(a.bias)[(b.channel + l) * 9 + kk]);
  return get(bias);
}

template <class T, int m>
void write_output(const ConditionalConvArgs& a, const Block<T>& b, const Region& r, const Acc<T>* sums) {
  constexpr int64_t L = Block<T>::L;
  const Tiling& t = a.tiling;
  for (int64_t y = 0; y < std::min(m * t.rows, t.H - r.y0 - 1); ++y) {
    T* row = at<T>(a.y, r.n, b.channel, (r.y0 + 1 + y) * t.W + r.x0 + 1);
    const Acc<T>* in = sums + (y / m * t.cols * m * m + y % m * m) * L;
    const auto value = [&](int64_t x, int64_t l) { return in[(x / m * m * m + x % m) * L + l]; };
    const int64_t width = std::min(m * t.cols, t.W - r.x0 - 1);
    if (a.y.c == 1) {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t l = 0; l < b.lanes; ++l) store(row[x * a.y.p + l], value(x, l));
    } else {
      for (int64_t l = 0; l < b.lanes; ++l)
        for (int64_t x = 0; x < width; ++x) store(row[x * a.y.p + l * a.y.c], value(x, l));
    }
  }
}

template <class T, int m>
void forward(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  constexpr int pixels = m * m;
  const Tiling& t = a.tiling;
  const int64_t PW = t.patch_width(), row = t.frequencies() * a.u_plane(L);
  A* u = static_cast<A*>(scratch);
  A* kernels = u + block_weights(a, L);
  A* patch = kernels + products(a, L);
  A* sums = patch + block_patch(a, L);
  int64_t made = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item / a.count, i = item % a.count;
    const Block<T> b(a, index);
    if (made != index) transform_weights<T, m>(a, b, u);
    made = index;
    const Region r = region_at(t, a.first + i);
    stage_patch<T>(t, a.x, r, b.channel, b.lanes, L, patch);
    std::fill(sums, sums + block_output(a, L), A(0));
    for (int64_t ky = 0; ky < 3; ++ky) {
      predict(a, static_cast<const A*>(a.v) + i * a.transformed(), u + ky * row, kernels);
      V bias[kTaps];
      for (int kx = 0; kx < kTaps; ++kx) bias[kx] = bias_of<T>(a, b, ky * 3 + kx);
      for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
        const A* x = patch + ((tile / t.cols * m + ky) * PW + tile % t.cols * m) * L;
        A* to = sums + tile * pixels * L;
        V sum[pixels];
        for (int q = 0; q < pixels; ++q) sum[q] = get(to + q * L);
#pragma GCC unroll 3
        for (int kx = 0; kx < kTaps; ++kx) {
          V w[pixels];
          kernels_of<A, m>(a, kernels, tile, kx, bias[kx], w);
#pragma GCC unroll 16
          for (int q = 0; q < pixels; ++q) sum[q] += w[q] * get(x + (q / m * PW + q % m + kx) * L);
        }
        for (int q = 0; q < pixels; ++q) put(to + q * L, sum[q]);
      }
    }
    write_output<T, m>(a, b, r, sums);
  }
}

// The tile's side as a constant.
template <class T>
void transform_condition_by(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.tiling.side == 4) transform_condition<T, 4>(a, begin, end, scratch);
  else transform_condition<T, 2>(a, begin, end, scratch);
}
template <class T>
void forward_by(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.tiling.side == 4) forward<T, 4>(a, begin, end, scratch);
  else forward<T, 2>(a, begin, end, scratch);
}

constexpr int64_t kFrequencies = 16;  // of the gradients' tiles of 2x2 pixels

// Gradients of a region's transformed kernels in one kernel row: dm[f][tile][tap][lane].
template <class A>
void kernel_gradients(const ConditionalConvArgs& a, const A* x, const A* dy, int64_t ky, A* dm,
                      Vec<A>* dbias) {
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  const Tiling& t = a.tiling;
  const int64_t PW = t.patch_width();
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t corner = (tile / t.cols * 2 * PW + tile % t.cols * 2) * L;
    for (int kx = 0; kx < kTaps; ++kx) {
      V dw[4] = {}, out[16];
      if (tile < t.rows * t.cols)
        for (int q = 0; q < 4; ++q) {
          dw[q] = get(dy + corner + ((q / 2 + 1) * PW + q % 2 + 1) * L) *
                  get(x + corner + ((q / 2 + ky) * PW + q % 2 + kx) * L);
          dbias[kx] += dw[q];
        }
      Winograd<V>::output_transposed(dw, out);
      for (int f = 0; f < 16; ++f) put(dm + f * a.m_plane(L) + (tile * kTaps + kx) * L, out[f]);
    }
  }
}

template <class T> void backward(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  const Tiling& t = a.tiling;
  const int64_t PW = t.patch_width(), depth = a.depth(), row = kFrequencies * a.u_plane(L);
  A* u = static_cast<A*>(scratch);
  A* m = u + block_weights(a, L);
  A* x = m + products(a, L);
  A* dy = x + block_patch(a, L);
  A* dx = dy + block_patch(a, L);
  for (int64_t index = begin; index < end; ++index) {
    const Block<T> b(a, index);
    if (a.dx.data != nullptr) transform_weights<T>(a, b, u);
    for (int64_t i = 0; i < a.count; ++i) {
      const Region r = region_at(t, a.first + i);
      const A* v = static_cast<const A*>(a.v) + i * a.transformed();
      stage_patch<T>(t, a.x, r, b.channel, b.lanes, L, x);
      stage_patch<T>(t, a.y, r, b.channel, b.lanes, L, dy);
      std::fill(dx, dx + block_patch(a, L), A(0));
      for (int64_t ky = 0; ky < 3; ++ky) {
        if (a.dx.data != nullptr) {
          predict(a, v, u + ky * row, m);
          for (int kx = 0; kx < kTaps; ++kx) {
            const V bias = bias_of<T>(a, b, ky * 3 + kx);
            for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
              const int64_t corner = (tile / t.cols * 2 * PW + tile % t.cols * 2) * L;
              V w[4];
              kernels_of(a, m, tile, kx, bias, w);
              for (int q = 0; q < 4; ++q) {
                A* to = dx + corner + ((q / 2 + ky) * PW + q % 2 + kx) * L;
                put(to, get(to) + w[q] * get(dy + corner + ((q / 2 + 1) * PW + q % 2 + 1) * L));
              }
            }
          }
        }
        if (a.du == nullptr) continue;
        V dbias[kTaps] = {};
        kernel_gradients(a, x, dy, ky, m, dbias);
        for (int kx = 0; kx < kTaps; ++kx)
          for (int64_t l = 0; l < b.lanes; ++l)
            static_cast<A*>(a.dbias)[(b.channel + l) * 9 + ky * 3 + kx] += dbias[kx][l];
        A* du = static_cast<A*>(a.du) + index * block_weights(a, L) + ky * row;
        for (int64_t f = 0; f < kFrequencies; ++f)
          for (int64_t k = 0; k < depth; k += kTileRows)
            product_tile<A, int(kTaps), true>(
                v + f * a.v_plane() + k, 1, depth, m + f * a.m_plane(L), kTaps * L, t.tiles,
                du + f * a.u_plane(L) + k * kTaps * L, kTaps * L);
      }
      if (a.dx.data != nullptr) add_patch(t, a.dx, r, b.channel, b.lanes, L, dx);
    }
  }
}

template <class T> void finish_weight_gradient(const ConditionalConvArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  const int64_t depth = a.depth();
  for (int64_t index = begin; index < end; ++index) {
    const Block<T> b(a, index);
    const A* du = static_cast<const A*>(a.du) + index * block_weights(a, L);
    T* weight = static_cast<T*>(a.dweight) + b.channel * 9 * a.D * 9;
    for (int64_t kk = 0; kk < 9; ++kk)
      for (int64_t k = 0; k < a.D; ++k) {
        V in[16], g[9];
        for (int64_t f = 0; f < 16; ++f)
          in[f] = get(du + (kk / 3 * 16 + f) * a.u_plane(L) + (k * kTaps + kk % 3) * L);
        Winograd<V>::weight_transposed(in, g);
        for (int64_t l = 0; l < b.lanes; ++l)
          for (int64_t i = 0; i < 9; ++i) store(weight[((l * 9 + kk) * a.D + k) * 9 + i], A(g[i][l]));
      }
  }
}

template <class T> void condition_gradient(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  constexpr int kVecs = 2;
  const Tiling& t = a.tiling;
  const int64_t depth = a.depth(), plane = a.v_plane();
  A* u = static_cast<A*>(scratch);
  A* m = u + block_weights(a, L);
  A* x = m + products(a, L);
  A* dy = x + block_patch(a, L);
  A* dv = static_cast<A*>(a.dv);
  std::fill(dv + begin * a.transformed(), dv + end * a.transformed(), A(0));
  for (int64_t index = 0; index * L < a.C; ++index) {
    const Block<T> b(a, index);
    transform_weights_transposed<T>(a, b, u);
    for (int64_t i = begin; i < end; ++i) {
      const Region r = region_at(t, a.first + i);
      stage_patch<T>(t, a.x, r, b.channel, b.lanes, L, x);
      stage_patch<T>(t, a.y, r, b.channel, b.lanes, L, dy);
      for (int64_t ky = 0; ky < 3; ++ky) {
        V dbias[kTaps] = {};
        kernel_gradients(a, x, dy, ky, m, dbias);
        for (int64_t f = 0; f < kFrequencies; ++f)
          for (int64_t tile = 0; tile < t.tiles; tile += kTileRows)
            for (int64_t k = 0; k < depth; k += kVecs * L)
              product_tile<A, kVecs, true>(
                  m + f * a.m_plane(L) + tile * kTaps * L, kTaps * L, 1,
                  u + (ky * kFrequencies + f) * a.u_plane(L) + k, depth, kTaps * L,
                  dv + i * a.transformed() + f * plane + tile * depth + k, depth);
      }
    }
  }
}

template <class T>
void finish_condition_gradient(const ConditionalConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = Lanes<A>::n;
  const Tiling& t = a.tiling;
  const int64_t depth = a.depth(), PW = t.patch_width();
  A* patch = static_cast<A*>(scratch);
  for (int64_t group = begin; group < end; ++group)
    for (int64_t i = 0; i < a.count; ++i) {
      std::fill(patch, patch + t.patch_pixels() * L, A(0));
      const A* dv = static_cast<const A*>(a.dv) + i * a.transformed() + group * L;
      for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
        V in[16], d[16];
        for (int f = 0; f < 16; ++f) in[f] = get(dv + f * a.v_plane() + tile * depth);
        Winograd<V>::input_transposed(in, d);
        A* corner = patch + (tile / t.cols * 2 * PW + tile % t.cols * 2) * L;
        for (int f = 0; f < 16; ++f) {
          A* to = corner + (f / 4 * PW + f % 4) * L;
          put(to, get(to) + d[f]);
        }
      }
      add_patch(t, a.dh, region_at(t, a.first + i), group * L, std::min(L, a.D - group * L), L, patch);
    }
}

}  // namespace

SMIS_BY_ELEMENT_WITH_SCRATCH(transform_condition_kernel, ConditionalConvArgs, transform_condition_by<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(conditional_conv_kernel, ConditionalConvArgs, forward_by<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(conditional_conv_backward_kernel, ConditionalConvArgs, backward<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(condition_gradient_kernel, ConditionalConvArgs, condition_gradient<T>)
SMIS_BY_ELEMENT_WITH_SCRATCH(finish_condition_gradient_kernel, ConditionalConvArgs, finish_condition_gradient<T>)

SMIS_BY_ELEMENT(finish_weight_gradient_kernel, ConditionalConvArgs, finish_weight_gradient<T>)
void conditional_conv_lanes(Element element, int64_t* lanes) {
  with_element(element, [&](auto t) { *lanes = Lanes<Acc<decltype(t)>>::n; });
}

}  // namespace smis::SMIS_ISA
