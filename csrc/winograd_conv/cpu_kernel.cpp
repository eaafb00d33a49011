// A block of tiles at a time: transform, a matrix product for each frequency, transform back.
// Layouts: cpu_kernel.h.
#include "winograd_conv/cpu_kernel.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/element.h"
#include "common/winograd_panels.h"
#include "winograd_conv/gradient.h"

namespace smis::SMIS_ISA {
namespace {

template <class A> using Shape = PanelShape<A>;
template <class A> Shape<A> shape_of(const WinogradArgs& a) { return {a.frequencies(), a.K, a.M, a.tiles}; }

// Channels [begin, end) of one panel of one group as u[f][k][column], `depth` rows a frequency:
// `some` kernels of every output at a time are transposed to lanes.
template <class A, int m, int vecs>
void panel_weights(const WinogradArgs& a, int64_t group, int64_t first, int64_t begin, int64_t end,
                   int64_t depth, A* u) {
  constexpr int64_t L = Lanes<A>::n, frequencies = (m + 2) * (m + 2);
  KernelsInLanes<A, 9, vecs> kernels(a);
  for (int64_t k = begin; k < end; k += kernels.some) {
    const int64_t some = std::min(kernels.some, end - k);
    kernels.read(group, first, k, some);
    for (int64_t j = 0; j < some; ++j)
      for (int v = 0; v < vecs; ++v) {
        Vec<A> g[9], out[frequencies];
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) g[i] = kernels.tap(j, i, v);
        Winograd<Vec<A>, m>::weight(g, out);
#pragma GCC unroll 36
        for (int64_t f = 0; f < frequencies; ++f)
          put(u + ((f * depth + k - begin + j) * vecs + v) * L, out[f]);
      }
  }
}

template <class A, int m>
void weights(const WinogradArgs& a, void* u, int64_t begin, int64_t end) {
  const Shape<A> s = shape_of<A>(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    A* to = static_cast<A*>(u) + group * a.transformed() + s.panel_offset(first);
    with_panel(s, first, [&](auto vecs) {
      panel_weights<A, m, vecs()>(a, group, first, 0, a.K, s.u_depth, to);
    });
  }
}

struct Tile {
  int64_t n, y, x;  // of its first output pixel
  Tile(const WinogradArgs& a, int64_t i) {
    const int64_t across = a.tiles_across(), each = across * a.tiles_down();
    n = i / each, y = i % each / across * a.tile, x = i % across * a.tile;
  }
};

template <class A, int m>
Patch<A, m> patch_of(const WinogradArgs& a, const Tile& t, int64_t group, const A* zeros) {
  Patch<A, m> patch;
  square_of<A, patch.side>(static_cast<const A*>(a.x) + t.n * a.batch_step + group * a.K, t.y - a.padding,
                           t.x - a.padding, 1, a.H, a.W, a.pixel_step, zeros, patch.at);
  return patch;
}

// `count` outputs of a group from the one numbered `column`: the first of p.
template <class A, int m>
void write_tile(const WinogradArgs& a, const Tile& t, int64_t group, int64_t column, int64_t count,
                const A* p, int64_t p_plane) {
  const int64_t channels = a.groups * a.M, h = a.height(), w = a.width();
  const int64_t output = group * a.M + column, at = ((t.n * h + t.y) * w + t.x) * channels + output;
  int64_t to[m * m];
  for (int q = 0; q < m * m; ++q)
    to[q] = t.y + q / m < h && t.x + q % m < w ? (q / m * w + q % m) * channels : kOutside;
  write_pixels<A, m>(p, p_plane, count, a.bias ? static_cast<const A*>(a.bias) + output : nullptr,
                     a.residual ? static_cast<const A*>(a.residual) + at : nullptr,
                     static_cast<A*>(a.y) + at, to, m * channels);
}

template <class A, int m> void conv(const WinogradArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> s = shape_of<A>(a);
  const auto [zeros, v, p] = BlockScratch<A>(s, scratch);
  const A* outside = zeros;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.blocks(), first = item % a.blocks() * a.tiles;
    const int64_t count = std::min(a.tiles, a.all_tiles() - first);
    transform_patches<A, m>(s, count, v, [&](int64_t i) {
      return patch_of<A, m>(a, Tile(a, first + i), group, outside);
    });
    const A* u = static_cast<const A*>(a.u) + group * a.transformed();
    for (int64_t f = 0; f < s.frequencies; ++f) product_of_frequency<false>(s, f, v, u, p);
    for (int64_t i = 0; i < count; ++i)
      write_tile<A, m>(a, Tile(a, first + i), group, 0, a.M, p + i * s.p_row, s.p_plane);
  }
}

// Few tiles: the transformed weights are never in memory, for each panel makes its own, a chunk of
// channels at a time, and multiplies all tiles while they are in cache.
template <class A, int m>
void transform_tiles(const WinogradArgs& a, void* v, int64_t begin, int64_t end) {
  const Shape<A> s = shape_of<A>(a);
  const std::vector<A> zeros(size_t(s.depth), A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.tiles, i = item % a.tiles;
    A* to = static_cast<A*>(v) + group * s.frequencies * s.v_plane + i * s.depth;
    if (i < a.all_tiles()) {
      const Patch<A, m> patch = patch_of<A, m>(a, Tile(a, i), group, zeros.data());
      transform_pixels<A, m>(patch, patch, a.K, to, s.v_plane);
    } else {
      for (int64_t f = 0; f < s.frequencies; ++f) std::fill_n(to + f * s.v_plane, s.depth, A(0));
    }
  }
}

template <class A, int m, int vecs>
void streamed_panel(const WinogradArgs& a, const Shape<A>& s, int64_t group, int64_t first, const A* v,
                    A* u) {
  constexpr int64_t L = Lanes<A>::n, row = vecs * L;
  const int64_t u_depth = kDepth + 1, p_plane = a.tiles * row + L;
  A* p = u + s.frequencies * u_depth * row;
  const int64_t chunks = (a.K + kDepth - 1) / kDepth, step = (a.K + chunks - 1) / chunks;
  for (int64_t k = 0; k < a.K; k += step) {
    const int64_t depth = std::min(step, a.K - k);
    panel_weights<A, m, vecs>(a, group, first, k, k + depth, u_depth, u);
    for (int64_t f = 0; f < s.frequencies; ++f)
      for (int64_t t = 0; t < a.all_tiles(); t += kTileRows) {
        const A* left = v + f * s.v_plane + t * s.depth + k;
        const A* right = u + f * u_depth * row;
        A* out = p + f * p_plane + t * row;
        if (k == 0) product_tile<A, vecs, false>(left, s.depth, 1, right, row, depth, out, row);
        else product_tile<A, vecs, true>(left, s.depth, 1, right, row, depth, out, row);
      }
  }
  const int64_t count = std::min(row, a.M - first * L);
  for (int64_t i = 0; i < a.all_tiles(); ++i)
    write_tile<A, m>(a, Tile(a, i), group, first * L, count, p + i * row, p_plane);
}

template <class A, int m>
void streamed(const WinogradArgs& a, const void* v, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> s = shape_of<A>(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    const A* from = static_cast<const A*>(v) + group * s.frequencies * s.v_plane;
    with_panel(s, first, [&](auto vecs) {
      streamed_panel<A, m, vecs()>(a, s, group, first, from, static_cast<A*>(scratch));
    });
  }
}

template <class A> WinogradPlan plan(const WinogradArgs& a) {
  const Shape<A> s = shape_of<A>(a);
  const int64_t row = kPanelVectors * s.L;
  return {s.panels(), BlockScratch<A>::size(s), s.frequencies * s.v_plane,
          s.frequencies * ((kDepth + 1 + a.tiles) * row + s.L)};
}

// fn(the element, m), both as constants.
template <class F> void with_form(const WinogradArgs& a, const F& fn) {
  const auto with_element = [&](auto m) { a.wide ? fn(double(), m) : fn(float(), m); };
  if (a.tile == 4) with_element(std::integral_constant<int, 4>());
  else with_element(std::integral_constant<int, 2>());
}

}  // namespace

void winograd_plan(const WinogradArgs& a, WinogradPlan* found) {
  *found = a.wide ? plan<double>(a) : plan<float>(a);
}
void winograd_weight_kernel(const WinogradArgs& a, void* u, int64_t begin, int64_t end) {
  with_form(a, [&](auto e, auto m) { weights<decltype(e), m()>(a, u, begin, end); });
}
void winograd_conv_kernel(const WinogradArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_form(a, [&](auto e, auto m) { conv<decltype(e), m()>(a, begin, end, scratch); });
}
void winograd_tiles_kernel(const WinogradArgs& a, void* v, int64_t begin, int64_t end) {
  with_form(a, [&](auto e, auto m) { transform_tiles<decltype(e), m()>(a, v, begin, end); });
}
void winograd_streamed_kernel(const WinogradArgs& a, const void* v, int64_t begin, int64_t end, void* scratch) {
  with_form(a, [&](auto e, auto m) { streamed<decltype(e), m()>(a, v, begin, end, scratch); });
}
void winograd_gradient_plan(const WinogradGradientArgs& a, WinogradGradientPlan* found) {
  *found = a.wide ? gradient_plan<double>(a) : gradient_plan<float>(a);
}
void winograd_gradient_tiles_kernel(const WinogradGradientArgs& a, int64_t begin, int64_t end) {
  a.wide ? gradient_tiles<double>(a, begin, end) : gradient_tiles<float>(a, begin, end);
}
void winograd_gradient_kernel(const WinogradGradientArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.wide ? gradient_items<double>(a, begin, end, scratch) : gradient_items<float>(a, begin, end, scratch);
}

}  // namespace smis::SMIS_ISA
