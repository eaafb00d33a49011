// The steps of Winograd's convs: pixels to v[f][tile][k], kernels to u[panel][f][k][column], their products
// p[f][tile][column] to pixels. A panel is what the register tile takes of the outputs.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "conv_weight.h"
#include "lanes.h"
#include "transposed.h"
#include "winograd.h"

namespace smis::SMIS_ISA {

constexpr int64_t kPanelVectors = 3;
constexpr int64_t kDepth = 160;  // channels at a time: a panel's chunk stays in the first cache

template <class A> struct PanelShape {
  static constexpr int64_t L = Lanes<A>::n;
  int64_t frequencies, K, tiles, vectors, u_depth, depth, v_plane, p_row, p_plane;
  PanelShape(int64_t frequencies, int64_t K, int64_t M, int64_t tiles)
      : frequencies(frequencies), K(K), tiles(tiles) {
    vectors = (M + L - 1) / L;
    // One row or line more than needed: at powers of two they would share cache sets.
    u_depth = K + 1;
    depth = (K + L - 1) / L * L + L;
    v_plane = tiles * depth + L;
    p_row = vectors * L + L;
    p_plane = tiles * p_row + L;
  }
  int64_t panels() const { return (vectors + kPanelVectors - 1) / kPanelVectors; }
  int64_t panel_offset(int64_t vector) const { return vector * L * frequencies * u_depth; }
};

// A thread's scratch for blocks of tiles: zeros for pixels outside, v and p. Rows of v that no tile
// writes are zero.
template <class A> struct BlockScratch {
  A *zeros, *v, *p;
  BlockScratch(const PanelShape<A>& s, void* scratch) : zeros(static_cast<A*>(scratch)) {
    v = zeros + s.depth;
    p = v + s.frequencies * s.v_plane;
    std::fill(zeros, p, A(0));
  }
  static int64_t size(const PanelShape<A>& s) { return s.depth + s.frequencies * (s.v_plane + s.p_plane); }
};

// fn(vecs as a constant), the vectors of a panel.
template <class F> void with_vecs(int64_t vecs, const F& fn) {
  if (vecs == 3) fn(std::integral_constant<int, 3>());
  else if (vecs == 2) fn(std::integral_constant<int, 2>());
  else fn(std::integral_constant<int, 1>());
}
// The same of the panel that begins with vector `first`.
template <class A, class F> void with_panel(const PanelShape<A>& s, int64_t first, const F& fn) {
  with_vecs(std::min(kPanelVectors, s.vectors - first), fn);
}

// Kernels of a panel's outputs, transposed to lanes: `some` channels of each at a time. Taps that are apart
// in memory (channels-last) are apart here too; a page holds one or two of them, so each is read for
// twice as many channels.
template <class A, int taps, int vecs> struct KernelsInLanes {
  static constexpr int64_t L = Lanes<A>::n, kMost = 576 / taps;
  alignas(kVectorBytes) A values[kMost * taps * vecs * L];
  const ConvWeight& a;
  const bool apart = a.tap_step != 1;
  const int64_t some = apart ? kMost : kMost / 2;
  const int64_t tap_step = (apart ? some : 1) * vecs * L, kernel_step = (apart ? 1 : taps) * vecs * L;

  explicit KernelsInLanes(const ConvWeight& a) : a(a) {}

  Vec<A> tap(int64_t kernel, int64_t i, int64_t v) const {
    return get(values + kernel * kernel_step + i * tap_step + v * L);
  }
  // `count` kernels, at most `some`, from channel k on, of the outputs from vector `first` on.
  void read(int64_t group, int64_t first, int64_t k, int64_t count) {
    const A* w = static_cast<const A*>(a.weight) + group * a.M * a.K * taps + first * L * a.out_step +
                 k * a.k_step;
    const auto rows = [&](int v, int64_t offset, int64_t columns, const auto& to) {
      transposed(w + v * L * a.out_step + offset, a.out_step, std::min(L, a.M - (first + v) * L), columns,
                 [&](int64_t i) { return to(i) + v * L; });
    };
    if (apart) {
      for (int64_t i = 0; i < taps; ++i)
        for (int v = 0; v < vecs; ++v)
          rows(v, i * a.tap_step, count,
               [&](int64_t j) { return values + i * tap_step + j * kernel_step; });
      return;
    }
    for (int v = 0; v < vecs; ++v)
      if (a.flipped)
        for (int64_t j = 0; j < count; ++j)
          rows(v, j * a.k_step, taps,
               [&](int64_t i) { return values + j * kernel_step + (taps - 1 - i) * tap_step; });
      else
        rows(v, 0, count * taps, [&](int64_t i) { return values + i * tap_step; });
  }
};

// The side x side pixels from (top, left) on, `step` apart, of an image of `height` x `width`; zeros
// outside of it.
template <class A, int side>
void square_of(const A* image, int64_t top, int64_t left, int64_t step, int64_t height, int64_t width,
               int64_t pixel_step, const A* zeros, const A** at) {
  for (int64_t i = 0; i < side * side; ++i) {
    const int64_t y = top + i / side * step, x = left + i % side * step;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    at[i] = inside ? image + (y * width + x) * pixel_step : zeros;
  }
}

// The pixels that a tile is computed from, K channels each.
template <class A, int m> struct Patch {
  static constexpr int side = Winograd<Vec<A>, m>::side;
  const A* at[side * side];
};

// A patch to a row of each plane of v. The columns of `next` that this one lacks are asked for: so
// many streams of so few lines are no pattern that a core foresees.
template <class A, int m>
void transform_pixels(const Patch<A, m>& patch, const Patch<A, m>& next, int64_t K, A* v,
                      int64_t v_plane) {
  constexpr int side = Patch<A, m>::side, frequencies = side * side;
  const A* const* from = patch.at;
  const auto transform = [&](int64_t k, const auto& read) {
#pragma GCC unroll 36
    for (int i = 0; i < frequencies; ++i)
      if (i % side >= side - m) __builtin_prefetch(next.at[i] + k);
    Vec<A> d[frequencies], out[frequencies];
#pragma GCC unroll 36
    for (int i = 0; i < frequencies; ++i) d[i] = read(from[i] + k);
    Winograd<Vec<A>, m>::input(d, out);
#pragma GCC unroll 36
    for (int f = 0; f < frequencies; ++f) put(v + f * v_plane + k, out[f]);
  };
  over_vectors<A>(
      K, [&](int64_t k) { transform(k, [](const A* p) { return get(p); }); },
      [&] { transform(0, [&](const A* p) { return get_some(p, K); }); });
}

// The patches of `count` tiles, patch_of(i), to rows of v.
template <class A, int m, class F>
void transform_patches(const PanelShape<A>& s, int64_t count, A* v, const F& patch_of) {
  Patch<A, m> patch = patch_of(0);
  for (int64_t i = 0; i < count; ++i) {
    const Patch<A, m> next = patch_of(std::min(i + 1, count - 1));
    transform_pixels<A, m>(patch, next, s.K, v + i * s.depth, s.v_plane);
    patch = next;
  }
}

constexpr int64_t kOutside = -1;

// `count` outputs of a tile, `to` the offsets of its pixels in y and the residual, or kOutside; those
// of the next tile, `step` elements on, are asked for.
template <class A, int m>
void write_pixels(const A* p, int64_t p_plane, int64_t count, const A* bias, const A* residual, A* y,
                  const int64_t* to, int64_t step) {
  constexpr int frequencies = Winograd<Vec<A>, m>::side * Winograd<Vec<A>, m>::side;
  const auto finish = [&](int64_t c, const auto& read, const auto& write) {
    Vec<A> in[frequencies], out[m * m];
#pragma GCC unroll 36
    for (int f = 0; f < frequencies; ++f) in[f] = get(p + f * p_plane + c);
    Winograd<Vec<A>, m>::output(in, out);
    for (int q = 0; q < m * m; ++q) {
      if (to[q] == kOutside) continue;
      __builtin_prefetch(y + to[q] + c + step, 1);
      if (bias) out[q] += read(bias + c);
      if (residual) {
        __builtin_prefetch(residual + to[q] + c + step);
        out[q] += read(residual + to[q] + c);
      }
      write(y + to[q] + c, out[q]);
    }
  };
  over_vectors<A>(
      count,
      [&](int64_t c) {
        finish(c, [](const A* p) { return get(p); }, [](A* p, Vec<A> value) { put(p, value); });
      },
      [&] {
        finish(0, [&](const A* p) { return get_some(p, count); },
               [&](A* p, Vec<A> value) { std::memcpy(p, &value, size_t(count) * sizeof(A)); });
      });
}

template <bool add, class A, int vecs>
void product_of_panel(const PanelShape<A>& s, const A* v, const A* u, A* p) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t chunks = (s.K + kDepth - 1) / kDepth, step = (s.K + chunks - 1) / chunks;
  for (int64_t k = 0; k < s.K; k += step) {
    const int64_t depth = std::min(step, s.K - k);
    for (int64_t t = 0; t < s.tiles; t += kTileRows) {
      const A* left = v + t * s.depth + k;
      const A* right = u + k * vecs * L;
      A* out = p + t * s.p_row;
      if (k == 0 && !add)
        product_tile<A, vecs, false>(left, s.depth, 1, right, vecs * L, depth, out, s.p_row);
      else
        product_tile<A, vecs, true>(left, s.depth, 1, right, vecs * L, depth, out, s.p_row);
    }
  }
}

// All tiles of a block and all outputs of a group at one frequency; `add`: to what p holds.
template <bool add, class A>
void product_of_frequency(const PanelShape<A>& s, int64_t f, const A* v, const A* u, A* p) {
  for (int64_t first = 0; first < s.vectors; first += kPanelVectors)
    with_panel(s, first, [&](auto vecs) {
      product_of_panel<add, A, vecs()>(s, v + f * s.v_plane,
                                       u + s.panel_offset(first) + f * s.u_depth * vecs() * s.L,
                                       p + f * s.p_plane + first * s.L);
    });
}

}  // namespace smis::SMIS_ISA
