// A block of tiles at a time: transform, 16 matrix products, transform back. Layouts: cpu_kernel.h.
#include "winograd_conv/cpu_kernel.h"

#include <algorithm>
#include <cstring>

#include "common/element.h"
#include "common/lanes.h"
#include "common/winograd.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kPanelVectors = 3, kFrequencies = 16;
constexpr int64_t kSome = 32;    // kernels of an output that are transposed at a time
constexpr int64_t kChunk = 160;  // channels at a time: a panel's chunk stays in the first cache

template <class A> struct Shape {
  static constexpr int64_t L = Lanes<A>::n;
  int64_t vectors, columns, u_depth, depth, v_plane, m_row, m_plane;
  explicit Shape(const WinogradArgs& a) {
    vectors = (a.M + L - 1) / L;
    columns = vectors * L;
    // One row or line more than needed: at powers of two they would share cache sets.
    u_depth = a.K + 1;
    depth = (a.K + L - 1) / L * L + L;
    v_plane = a.tiles * depth + L;
    m_row = columns + L;
    m_plane = a.tiles * m_row + L;
  }
  int64_t panels() const { return (vectors + kPanelVectors - 1) / kPanelVectors; }
  int64_t transformed() const { return columns * kFrequencies * u_depth; }  // weights of a group
  int64_t panel_offset(int64_t vector) const { return vector * L * kFrequencies * u_depth; }
};

// Calls fn at every vector of `count` values; the last one lies where it ends with them. Fewer
// values than a vector hold are read and written by `some` instead.
template <class A, class F, class G>
inline void over_vectors(int64_t count, const F& whole, const G& some) {
  constexpr int64_t L = Lanes<A>::n;
  if (count < L) return some();
  for (int64_t i = 0; i + L <= count; i += L) whole(i);
  if (count % L != 0) whole(count - L);
}

template <class A> Vec<A> get_some(const A* p, int64_t count) {
  alignas(kVectorBytes) A values[Lanes<A>::n] = {};
  std::memcpy(values, p, size_t(count) * sizeof(A));
  return get(values);
}

// One panel of one group: `some` kernels of every output at a time are transposed to lanes.
template <class A, int vecs>
void panel_weights(const WinogradArgs& a, const Shape<A>& s, int64_t group, int64_t first, A* taps) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t count = std::min(vecs * L, a.M - first * L);
  const A* w = static_cast<const A*>(a.weight) + (group * a.M + first * L) * a.K * 9;
  A* u = static_cast<A*>(a.u) + group * s.transformed() + s.panel_offset(first);
  std::fill(taps, taps + kSome * 9 * vecs * L, A(0));
  for (int64_t k = 0; k < a.K; k += kSome) {
    const int64_t some = std::min(kSome, a.K - k);
    for (int64_t l = 0; l < count; ++l) {
      const A* from = w + l * a.K * 9 + k * a.k_step;
      A* to = taps + l;
      if (a.tap_step == 1)
        for (int64_t i = 0; i < some * 9; ++i) to[i * vecs * L] = from[i];
      else
        for (int64_t i = 0; i < 9; ++i)
          for (int64_t j = 0; j < some; ++j) to[(j * 9 + i) * vecs * L] = from[i * a.tap_step + j];
    }
    for (int64_t j = 0; j < some; ++j)
      for (int v = 0; v < vecs; ++v) {
        Vec<A> g[9], out[16];
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) g[i] = get(taps + (j * 9 + i) * vecs * L + v * L);
        Winograd<Vec<A>>::weight(g, out);
#pragma GCC unroll 16
        for (int64_t f = 0; f < kFrequencies; ++f)
          put(u + ((f * s.u_depth + k + j) * vecs + v) * L, out[f]);
      }
  }
}

template <class A> void weights(const WinogradArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<A>::n;
  const Shape<A> s(a);
  alignas(kVectorBytes) A taps[kSome * 9 * kPanelVectors * L];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    const int64_t vecs = std::min(kPanelVectors, s.vectors - first);
    if (vecs == 3) panel_weights<A, 3>(a, s, group, first, taps);
    else if (vecs == 2) panel_weights<A, 2>(a, s, group, first, taps);
    else panel_weights<A, 1>(a, s, group, first, taps);
  }
}

struct Tile {
  int64_t n, y, x;  // of its first output pixel
  Tile(const WinogradArgs& a, int64_t i) {
    const int64_t across = a.tiles_across(), each = across * a.tiles_down();
    n = i / each, y = i % each / across * 2, x = i % across * 2;
  }
};

template <class A>
void transform_tile(const WinogradArgs& a, const Shape<A>& s, const Tile& t, int64_t group,
                    const A* zeros, A* v) {
  const A* from[16];
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t y = t.y + i / 4 - a.padding, x = t.x + i % 4 - a.padding;
    const bool inside = y >= 0 && y < a.H && x >= 0 && x < a.W;
    from[i] = inside ? static_cast<const A*>(a.x) + t.n * a.batch_step +
                           (y * a.W + x) * a.pixel_step + group * a.K
                     : zeros;
  }
  const auto transform = [&](int64_t k, const auto& read) {
    Vec<A> d[16], out[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) d[i] = read(from[i] + k);
    Winograd<Vec<A>>::input(d, out);
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f) put(v + f * s.v_plane + k, out[f]);
  };
  over_vectors<A>(
      a.K, [&](int64_t k) { transform(k, [](const A* p) { return get(p); }); },
      [&] { transform(0, [&](const A* p) { return get_some(p, a.K); }); });
}

template <class A, int vecs>
void panel(const WinogradArgs& a, const Shape<A>& s, const A* v, const A* u, A* m) {
  constexpr int64_t L = Lanes<A>::n;
  const int64_t chunks = (a.K + kChunk - 1) / kChunk, step = (a.K + chunks - 1) / chunks;
  for (int64_t k = 0; k < a.K; k += step) {
    const int64_t depth = std::min(step, a.K - k);
    for (int64_t t = 0; t < a.tiles; t += kTileRows) {
      const A* left = v + t * s.depth + k;
      const A* right = u + k * vecs * L;
      A* out = m + t * s.m_row;
      if (k == 0)
        product_tile<A, vecs, false>(left, s.depth, 1, right, vecs * L, depth, out, s.m_row);
      else
        product_tile<A, vecs, true>(left, s.depth, 1, right, vecs * L, depth, out, s.m_row);
    }
  }
}

template <class A>
void products(const WinogradArgs& a, const Shape<A>& s, const A* v, const A* u, A* m) {
  constexpr int64_t L = Lanes<A>::n;
  for (int64_t f = 0; f < kFrequencies; ++f)
    for (int64_t first = 0; first < s.vectors; first += kPanelVectors) {
      const int64_t vecs = std::min(kPanelVectors, s.vectors - first);
      const A* left = v + f * s.v_plane;
      const A* right = u + s.panel_offset(first) + f * s.u_depth * vecs * L;
      A* out = m + f * s.m_plane + first * L;
      if (vecs == 3) panel<A, 3>(a, s, left, right, out);
      else if (vecs == 2) panel<A, 2>(a, s, left, right, out);
      else panel<A, 1>(a, s, left, right, out);
    }
}

template <class A>
void write_tile(const WinogradArgs& a, const Shape<A>& s, const Tile& t, int64_t group, const A* m) {
  const int64_t channels = a.groups * a.M, h = a.height(), w = a.width();
  const int64_t at = ((t.n * h + t.y) * w + t.x) * channels + group * a.M;
  A* y = static_cast<A*>(a.y) + at;
  const A* residual = a.residual ? static_cast<const A*>(a.residual) + at : nullptr;
  const A* bias = a.bias ? static_cast<const A*>(a.bias) + group * a.M : nullptr;
  const auto finish = [&](int64_t c, const auto& read, const auto& write) {
    Vec<A> in[16], out[4];
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f) in[f] = get(m + f * s.m_plane + c);
    Winograd<Vec<A>>::output(in, out);
    for (int q = 0; q < 4; ++q) {
      if (t.y + q / 2 >= h || t.x + q % 2 >= w) continue;
      const int64_t to = (q / 2 * w + q % 2) * channels + c;
      if (bias) out[q] += read(bias + c);
      if (residual) out[q] += read(residual + to);
      write(y + to, out[q]);
    }
  };
  over_vectors<A>(
      a.M,
      [&](int64_t c) {
        finish(c, [](const A* p) { return get(p); }, [](A* p, Vec<A> value) { put(p, value); });
      },
      [&] {
        finish(0, [&](const A* p) { return get_some(p, a.M); },
               [&](A* p, Vec<A> value) { std::memcpy(p, &value, size_t(a.M) * sizeof(A)); });
      });
}

template <class A> void conv(const WinogradArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> s(a);
  A* zeros = static_cast<A*>(scratch);
  A* v = zeros + s.depth;
  A* m = v + kFrequencies * s.v_plane;
  std::fill(zeros, v + kFrequencies * s.v_plane, A(0));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.blocks(), first = item % a.blocks() * a.tiles;
    const int64_t count = std::min(a.tiles, a.all_tiles() - first);
    for (int64_t i = 0; i < count; ++i)
      transform_tile<A>(a, s, Tile(a, first + i), group, zeros, v + i * s.depth);
    products<A>(a, s, v, static_cast<const A*>(a.u) + group * s.transformed(), m);
    for (int64_t i = 0; i < count; ++i)
      write_tile<A>(a, s, Tile(a, first + i), group, m + i * s.m_row);
  }
}

template <class A>
void plan(const WinogradArgs& a, int64_t* transformed, int64_t* scratch, int64_t* panels) {
  const Shape<A> s(a);
  *transformed = s.transformed();
  *scratch = s.depth + kFrequencies * (s.v_plane + s.m_plane);
  *panels = s.panels();
}

}  // namespace

void winograd_plan(const WinogradArgs& a, int64_t* transformed, int64_t* scratch,
                   int64_t* panels) {
  a.wide ? plan<double>(a, transformed, scratch, panels)
         : plan<float>(a, transformed, scratch, panels);
}
void winograd_weight_kernel(const WinogradArgs& a, int64_t begin, int64_t end) {
  a.wide ? weights<double>(a, begin, end) : weights<float>(a, begin, end);
}
void winograd_conv_kernel(const WinogradArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.wide ? conv<double>(a, begin, end, scratch) : conv<float>(a, begin, end, scratch);
}

}  // namespace smis::SMIS_ISA
