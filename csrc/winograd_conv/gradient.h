// The gradient of a 3x3 conv's weight by Winograd's F(3x3, 2x2): a tile is 2x2 pixels of the output's
// gradient and the 4x4 of the input that they are computed from. Both are transformed, tile by tile, to
// v[group][f][panel][tile][column] and d[group][f][rows][tile][row]; their products, summed over tiles,
// are u[group][panel][some rows][f][row][column], transformed to the nine taps once all tiles are in.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/winograd_panels.h"
#include "winograd_conv/cpu_kernel.h"

namespace smis::SMIS_ISA {

constexpr int64_t kTiles = 128;  // at a time in a product: a panel's stay in the first cache

// Sizes in elements. Channels are columns, in panels of nearly as many vectors; outputs are rows.
template <class A> struct GradientShape {
  static constexpr int64_t L = Lanes<A>::n, frequencies = 16;
  static constexpr int64_t D = std::max<int64_t>(L, kTileRows);  // rows that lie together
  int64_t tiles, vectors, panels, height, v_plane, d_plane;
  explicit GradientShape(const WinogradGradientArgs& a) : tiles(a.tiles) {
    vectors = (a.K + L - 1) / L;
    panels = (vectors + kPanelVectors - 1) / kPanelVectors;
    height = (a.M + D - 1) / D * D;
    // One vector more than needed: at powers of two planes would share cache sets.
    v_plane = vectors * tiles * L + L;
    d_plane = height * tiles + L;
  }
  int64_t first(int64_t panel) const {  // vector
    return panel * (vectors / panels) + std::min(panel, vectors % panels);
  }
  int64_t vecs(int64_t panel) const { return first(panel + 1) - first(panel); }
};

// fn(first value, how to read a vector there) for each vector of `count` values; lanes beyond are zero.
template <class A, class F> void by_lanes(int64_t count, const F& fn) {
  constexpr int64_t L = Lanes<A>::n;
  int64_t i = 0;
  for (; i + L <= count; i += L) fn(i, [](const A* p) { return get(p); });
  if (i < count) fn(i, [&](const A* p) { return get_some(p, count - i); });
}

struct GradientTile {
  int64_t n, y, x;
  GradientTile(const WinogradGradientArgs& a, int64_t i) {
    const int64_t across = (a.width + 1) / 2, each = across * ((a.height + 1) / 2);
    n = i / each, y = i % each / across * 2, x = i % across * 2;
  }
};

template <class A> struct GradientPatch {
  const A *x[16], *grad[4];
  GradientPatch(const WinogradGradientArgs& a, int64_t tile, int64_t group, const A* zeros) {
    const GradientTile t(a, tile);
    square_of<A, 4>(static_cast<const A*>(a.x) + t.n * a.x_batch + group * a.K, t.y - a.padding,
                    t.x - a.padding, 1, a.H, a.W, a.x_pixel, zeros, x);
    square_of<A, 2>(static_cast<const A*>(a.grad) + t.n * a.grad_batch + group * a.M, t.y, t.x,
                    1, a.height, a.width, a.grad_pixel, zeros, grad);
  }
};

template <class A> void gradient_tiles(const WinogradGradientArgs& a, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const GradientShape<A> s(a);
  constexpr int64_t L = s.L, D = s.D;
  const std::vector<A> zeros(size_t(std::max(a.K, a.M)), A(0));
  for (int64_t group = 0; group < a.groups; ++group) {
    A* v = static_cast<A*>(a.v) + group * s.frequencies * s.v_plane;
    A* d = static_cast<A*>(a.d) + group * s.frequencies * s.d_plane;
    GradientPatch<A> patch(a, a.first + begin, group, zeros.data());
    for (int64_t i = begin; i < end; ++i) {
      // Asked for a tile ahead, as in transform_pixels.
      const GradientPatch<A> next(a, a.first + std::min(i + 1, end - 1), group, zeros.data());
      int64_t panel = 0;
      by_lanes<A>(a.K, [&](int64_t k, const auto& read) {
        V in[16], out[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          if (j % 4 >= 2) __builtin_prefetch(next.x[j] + k);
          in[j] = read(patch.x[j] + k);
        }
        Winograd<V, 3>::input(in, out);
        if (k / L == s.first(panel + 1)) ++panel;
        const int64_t first = s.first(panel);
        A* to = v + first * s.tiles * L + (i * s.vecs(panel) + k / L - first) * L;
#pragma GCC unroll 16
        for (int f = 0; f < 16; ++f) put(to + f * s.v_plane, out[f]);
      });
      by_lanes<A>(a.M, [&](int64_t m, const auto& read) {
        V in[4], out[16];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          __builtin_prefetch(next.grad[j] + m);
          in[j] = read(patch.grad[j] + m);
        }
        Winograd<V, 3>::weight(in, out);
        A* to = d + (m / D * s.tiles + i) * D + m % D;
#pragma GCC unroll 16
        for (int f = 0; f < 16; ++f) put(to + f * s.d_plane, out[f]);
      });
      patch = next;
    }
  }
}

// Some rows and one panel; `u` is where the sums of earlier blocks are and those of this one go.
template <class A, int vecs>
void gradient_products(const WinogradGradientArgs& a, const GradientShape<A>& s, int64_t group,
                       int64_t panel, int64_t top, int64_t rows, A* u) {
  constexpr int64_t L = s.L, D = s.D, row = vecs * L;
  const A* v = static_cast<const A*>(a.v) + group * s.frequencies * s.v_plane + s.first(panel) * s.tiles * L;
  const A* d = static_cast<const A*>(a.d) + group * s.frequencies * s.d_plane;
  for (int64_t f = 0; f < s.frequencies; ++f)
    for (int64_t t = 0; t < a.count; t += kTiles) {
      const int64_t depth = std::min(kTiles, a.count - t);
      const A* right = v + f * s.v_plane + t * row;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t m = top + r;
        const A* left = d + f * s.d_plane + (m / D * s.tiles + t) * D + m % D;
        A* out = u + (f * rows + r) * row;
        if (a.first == 0 && t == 0) product_tile<A, vecs, false>(left, 1, D, right, row, depth, out, row);
        else product_tile<A, vecs, true>(left, 1, D, right, row, depth, out, row);
      }
    }
  if (a.first + a.count < a.all_tiles()) return;
  for (int64_t r = 0; r < std::min(rows, a.M - top); ++r)
    for (int64_t j = 0; j < vecs; ++j) {
      Vec<A> in[16], out[9];
#pragma GCC unroll 16
      for (int64_t f = 0; f < 16; ++f) in[f] = get(u + (f * rows + r) * row + j * L);
      Winograd<Vec<A>, 3>::output(in, out);
      const int64_t k = (s.first(panel) + j) * L, count = std::min(L, a.K - k);
      A* to = static_cast<A*>(a.dweight) + (group * a.M + top + r) * 9 * a.K + k;
      for (int64_t tap = 0; tap < 9; ++tap) std::memcpy(to + tap * a.K, &out[tap], size_t(count) * sizeof(A));
    }
}

template <class A> void gradient_items(const WinogradGradientArgs& a, int64_t begin, int64_t end, void* scratch) {
  const GradientShape<A> s(a);
  const int64_t across = (s.height + a.rows - 1) / a.rows, each = s.panels * across;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / each, panel = item % each / across, top = item % across * a.rows;
    const int64_t rows = std::min(a.rows, s.height - top);
    with_vecs(s.vecs(panel), [&](auto vecs) {
      A* u = static_cast<A*>(a.u ? a.u : scratch);
      if (a.u) u += ((group * s.vectors + s.first(panel)) * s.height + top * vecs()) * s.frequencies * s.L;
      gradient_products<A, vecs()>(a, s, group, panel, top, rows, u);
    });
  }
}

template <class A> WinogradGradientPlan gradient_plan(const WinogradGradientArgs& a) {
  const GradientShape<A> s(a);
  return {a.groups * s.panels * ((s.height + a.rows - 1) / a.rows),
          a.groups * s.frequencies * s.v_plane, a.groups * s.frequencies * s.d_plane,
          a.groups * s.frequencies * s.height * s.vectors * s.L,
          s.frequencies * a.rows * kPanelVectors * s.L};
}

}  // namespace smis::SMIS_ISA
