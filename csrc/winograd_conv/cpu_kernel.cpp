// A block of tiles at a time: transform, a matrix product for each frequency, transform back.
// Layouts: cpu_kernel.h.
#include "winograd_conv/cpu_kernel.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/element.h"
#include "common/lanes.h"
#include "common/transposed.h"
#include "common/winograd.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kPanelVectors = 3;
constexpr int64_t kSome = 32;    // kernels of an output that are transposed at a time
constexpr int64_t kChunk = 160;  // channels at a time: a panel's chunk stays in the first cache

template <class A> struct Shape {
  static constexpr int64_t L = Lanes<A>::n;
  int64_t frequencies, vectors, u_depth, depth, v_plane, p_row, p_plane;
  explicit Shape(const WinogradArgs& a) {
    frequencies = a.frequencies();
    vectors = (a.M + L - 1) / L;
    // One row or line more than needed: at powers of two they would share cache sets.
    u_depth = a.K + 1;
    depth = (a.K + L - 1) / L * L + L;
    v_plane = a.tiles * depth + L;
    p_row = vectors * L + L;
    p_plane = a.tiles * p_row + L;
  }
  int64_t panels() const { return (vectors + kPanelVectors - 1) / kPanelVectors; }
  int64_t panel_offset(int64_t vector) const { return vector * L * frequencies * u_depth; }
};

// Channels [begin, end) of one panel of one group as u[f][k][column], `depth` rows a frequency:
// `some` kernels of every output at a time are transposed to lanes.
template <class A, int m, int vecs>
void panel_weights(const WinogradArgs& a, int64_t group, int64_t first, int64_t begin, int64_t end,
                   int64_t depth, A* u) {
  constexpr int64_t L = Lanes<A>::n, frequencies = (m + 2) * (m + 2);
  alignas(kVectorBytes) A taps[kSome * 9 * vecs * L];
  const A* w = static_cast<const A*>(a.weight) + group * a.M * a.K * 9 + first * L * a.out_step;
  for (int64_t k = begin; k < end; k += kSome) {
    const int64_t some = std::min(kSome, end - k);
    // taps[j][i][l] of kernel j, tap i; or taps[i][j][l] where taps are apart in memory too.
    const bool apart = a.tap_step != 1;
    for (int v = 0; v < vecs; ++v) {
      const int64_t count = std::min(L, a.M - (first + v) * L);
      const A* from = w + v * L * a.out_step + k * a.k_step;
      if (apart)
        for (int64_t i = 0; i < 9; ++i)
          transposed(from + i * a.tap_step, a.out_step, count, some,
                     [&](int64_t j) { return taps + ((i * kSome + j) * vecs + v) * L; });
      else if (a.flipped)
        for (int64_t j = 0; j < some; ++j)
          transposed(from + j * a.k_step, a.out_step, count, 9,
                     [&](int64_t i) { return taps + ((j * 9 + 8 - i) * vecs + v) * L; });
      else
        transposed(from, a.out_step, count, some * 9,
                   [&](int64_t i) { return taps + (i * vecs + v) * L; });
    }
    const int64_t tap = (apart ? kSome : 1) * vecs * L, kernel = (apart ? 1 : 9) * vecs * L;
    for (int64_t j = 0; j < some; ++j)
      for (int v = 0; v < vecs; ++v) {
        Vec<A> g[9], out[frequencies];
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) g[i] = get(taps + j * kernel + i * tap + v * L);
        Winograd<Vec<A>, m>::weight(g, out);
#pragma GCC unroll 36
        for (int64_t f = 0; f < frequencies; ++f)
          put(u + ((f * depth + k - begin + j) * vecs + v) * L, out[f]);
      }
  }
}

// fn(vecs as a constant), the vectors of the panel that begins with vector `first`.
template <class A, class F> void with_panel(const Shape<A>& s, int64_t first, const F& fn) {
  const int64_t vecs = std::min(kPanelVectors, s.vectors - first);
  if (vecs == 3) fn(std::integral_constant<int, 3>());
  else if (vecs == 2) fn(std::integral_constant<int, 2>());
  else fn(std::integral_constant<int, 1>());
}

template <class A, int m>
void weights(const WinogradArgs& a, void* u, int64_t begin, int64_t end) {
  const Shape<A> s(a);
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
void transform_tile(const WinogradArgs& a, const Shape<A>& s, const Tile& t, int64_t group,
                    const A* zeros, A* v) {
  constexpr int side = m + 2, frequencies = side * side;
  const A* from[frequencies];
  for (int64_t i = 0; i < frequencies; ++i) {
    const int64_t y = t.y + i / side - a.padding, x = t.x + i % side - a.padding;
    const bool inside = y >= 0 && y < a.H && x >= 0 && x < a.W;
    from[i] = inside ? static_cast<const A*>(a.x) + t.n * a.batch_step +
                           (y * a.W + x) * a.pixel_step + group * a.K
                     : zeros;
  }
  const auto transform = [&](int64_t k, const auto& read) {
    Vec<A> d[frequencies], out[frequencies];
#pragma GCC unroll 36
    for (int i = 0; i < frequencies; ++i) d[i] = read(from[i] + k);
    Winograd<Vec<A>, m>::input(d, out);
#pragma GCC unroll 36
    for (int f = 0; f < frequencies; ++f) put(v + f * s.v_plane + k, out[f]);
  };
  over_vectors<A>(
      a.K, [&](int64_t k) { transform(k, [](const A* p) { return get(p); }); },
      [&] { transform(0, [&](const A* p) { return get_some(p, a.K); }); });
}

template <class A, int vecs>
void panel(const WinogradArgs& a, const Shape<A>& s, const A* v, const A* u, A* p) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t chunks = (a.K + kChunk - 1) / kChunk, step = (a.K + chunks - 1) / chunks;
  for (int64_t k = 0; k < a.K; k += step) {
    const int64_t depth = std::min(step, a.K - k);
    for (int64_t t = 0; t < a.tiles; t += kTileRows) {
      const A* left = v + t * s.depth + k;
      const A* right = u + k * vecs * L;
      A* out = p + t * s.p_row;
      if (k == 0)
        product_tile<A, vecs, false>(left, s.depth, 1, right, vecs * L, depth, out, s.p_row);
      else
        product_tile<A, vecs, true>(left, s.depth, 1, right, vecs * L, depth, out, s.p_row);
    }
  }
}

template <class A>
void products(const WinogradArgs& a, const Shape<A>& s, const A* v, const A* u, A* p) {
  constexpr int64_t L = Lanes<A>::n;
  for (int64_t f = 0; f < s.frequencies; ++f)
    for (int64_t first = 0; first < s.vectors; first += kPanelVectors)
      with_panel(s, first, [&](auto vecs) {
        panel<A, vecs()>(a, s, v + f * s.v_plane,
                         u + s.panel_offset(first) + f * s.u_depth * vecs() * L,
                         p + f * s.p_plane + first * L);
      });
}

// `count` outputs of a group from the one numbered `column`: the first of p.
template <class A, int m>
void write_tile(const WinogradArgs& a, const Tile& t, int64_t group, int64_t column, int64_t count,
                const A* p, int64_t p_plane) {
  constexpr int frequencies = (m + 2) * (m + 2);
  const int64_t channels = a.groups * a.M, h = a.height(), w = a.width();
  const int64_t output = group * a.M + column, at = ((t.n * h + t.y) * w + t.x) * channels + output;
  A* y = static_cast<A*>(a.y) + at;
  const A* residual = a.residual ? static_cast<const A*>(a.residual) + at : nullptr;
  const A* bias = a.bias ? static_cast<const A*>(a.bias) + output : nullptr;
  const auto finish = [&](int64_t c, const auto& read, const auto& write) {
    Vec<A> in[frequencies], out[m * m];
#pragma GCC unroll 36
    for (int f = 0; f < frequencies; ++f) in[f] = get(p + f * p_plane + c);
    Winograd<Vec<A>, m>::output(in, out);
    for (int q = 0; q < m * m; ++q) {
      if (t.y + q / m >= h || t.x + q % m >= w) continue;
      const int64_t to = (q / m * w + q % m) * channels + c;
      if (bias) out[q] += read(bias + c);
      if (residual) out[q] += read(residual + to);
      write(y + to, out[q]);
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

template <class A, int m> void conv(const WinogradArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> s(a);
  A* zeros = static_cast<A*>(scratch);
  A* v = zeros + s.depth;
  A* p = v + s.frequencies * s.v_plane;
  std::fill(zeros, v + s.frequencies * s.v_plane, A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.blocks(), first = item % a.blocks() * a.tiles;
    const int64_t count = std::min(a.tiles, a.all_tiles() - first);
    for (int64_t i = 0; i < count; ++i)
      transform_tile<A, m>(a, s, Tile(a, first + i), group, zeros, v + i * s.depth);
    products<A>(a, s, v, static_cast<const A*>(a.u) + group * a.transformed(), p);
    for (int64_t i = 0; i < count; ++i)
      write_tile<A, m>(a, Tile(a, first + i), group, 0, a.M, p + i * s.p_row, s.p_plane);
  }
}

// Few tiles: the transformed weights are never in memory, for each panel makes its own, a chunk of
// channels at a time, and multiplies all tiles while they are in cache.
template <class A, int m>
void transform_tiles(const WinogradArgs& a, void* v, int64_t begin, int64_t end) {
  const Shape<A> s(a);
  const std::vector<A> zeros(size_t(s.depth), A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.tiles, i = item % a.tiles;
    A* to = static_cast<A*>(v) + group * s.frequencies * s.v_plane + i * s.depth;
    if (i < a.all_tiles()) transform_tile<A, m>(a, s, Tile(a, i), group, zeros.data(), to);
    else for (int64_t f = 0; f < s.frequencies; ++f) std::fill_n(to + f * s.v_plane, s.depth, A(0));
  }
}

template <class A, int m, int vecs>
void streamed_panel(const WinogradArgs& a, const Shape<A>& s, int64_t group, int64_t first, const A* v,
                    A* u) {
  constexpr int64_t L = Lanes<A>::n, row = vecs * L;
  const int64_t u_depth = kChunk + 1, p_plane = a.tiles * row + L;
  A* p = u + s.frequencies * u_depth * row;
  const int64_t chunks = (a.K + kChunk - 1) / kChunk, step = (a.K + chunks - 1) / chunks;
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
  const Shape<A> s(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    const A* from = static_cast<const A*>(v) + group * s.frequencies * s.v_plane;
    with_panel(s, first, [&](auto vecs) {
      streamed_panel<A, m, vecs()>(a, s, group, first, from, static_cast<A*>(scratch));
    });
  }
}

template <class A> WinogradPlan plan(const WinogradArgs& a) {
  const Shape<A> s(a);
  const int64_t row = kPanelVectors * s.L;
  return {s.panels(), s.depth + s.frequencies * (s.v_plane + s.p_plane), s.frequencies * s.v_plane,
          s.frequencies * ((kChunk + 1 + a.tiles) * row + s.L)};
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

}  // namespace smis::SMIS_ISA
