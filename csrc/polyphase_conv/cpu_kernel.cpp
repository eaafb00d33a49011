// A block of tiles at a time, phase by phase: transform, a matrix product for each frequency, transform
// back. Layouts: cpu_kernel.h, common/winograd_panels.h.
#include "polyphase_conv/cpu_kernel.h"

#include "common/element.h"
#include "common/winograd_panels.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int kTile = PolyphaseArgs::kTile, kSide = 4, kPhases = PolyphaseArgs::kPhases;

template <class A> PanelShape<A> shape_of(const PolyphaseArgs& a) {
  return {a.kFrequencies, a.K, a.M, a.tiles};
}

// Along one axis: the tap of a kernel that is tap j of phase b's; `side` or more and below zero: none.
int tap_of(const PolyphaseArgs& a, int b, int j) {
  if (a.transposed) return int(a.side()) - 3 + 2 * j - b;  // of taps in reverse
  return a.stride == 2 ? 2 * j + b : j + 2 * b;
}

// Whether a phase's kernel is zero at the frequency.
bool skipped(const PolyphaseArgs& a, int phase, int64_t f) {
  if (a.side() == 4) return false;
  const int zero = a.transposed ? 0 : kSide - 1;
  return (phase / 2 == 1 && f / kSide == zero) || (phase % 2 == 1 && f % kSide == zero);
}

template <class A, int taps, int vecs>
void panel_weights(const PolyphaseArgs& a, const PanelShape<A>& s, int64_t group, int64_t first, A* u) {
  constexpr int64_t L = Lanes<A>::n;
  KernelsInLanes<A, taps, vecs> kernels(a);
  for (int64_t k = 0; k < a.K; k += kernels.some) {
    const int64_t some = std::min(kernels.some, a.K - k);
    kernels.read(group, first, k, some);
    for (int phase = 0; phase < kPhases; ++phase) {
      A* to = u + phase * a.transformed();
      bool zero[kSide * kSide];
      for (int64_t f = 0; f < kSide * kSide; ++f) zero[f] = skipped(a, phase, f);
      int tap[4];
      for (int i = 0; i < 4; ++i) {
        const int y = tap_of(a, phase / 2, i / 2), x = tap_of(a, phase % 2, i % 2), side = int(a.side());
        tap[i] = y >= 0 && y < side && x >= 0 && x < side ? y * side + x : -1;
      }
      for (int64_t j = 0; j < some; ++j)
        for (int v = 0; v < vecs; ++v) {
          Vec<A> g[4], out[kSide * kSide];
          for (int i = 0; i < 4; ++i) g[i] = tap[i] < 0 ? Vec<A>{} : kernels.tap(j, tap[i], v);
          Winograd<Vec<A>, kTile>::weight(g, out);
#pragma GCC unroll 16
          for (int64_t f = 0; f < kSide * kSide; ++f)
            if (!zero[f]) put(to + ((f * s.u_depth + k + j) * vecs + v) * L, out[f]);
        }
    }
  }
}

template <class A, int taps>
void weights(const PolyphaseArgs& a, void* u, int64_t begin, int64_t end) {
  const PanelShape<A> s = shape_of<A>(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    A* to = static_cast<A*>(u) + group * kPhases * a.transformed() + s.panel_offset(first);
    with_panel(s, first, [&](auto vecs) { panel_weights<A, taps, vecs()>(a, s, group, first, to); });
  }
}

struct Tile {
  int64_t n, y, x;  // of its first output, of those of one phase in a transposed conv
  Tile(const PolyphaseArgs& a, int64_t i) {
    const int64_t across = a.tiles_across(), each = across * a.tiles_down();
    n = i / each;
    y = i % each / across * kTile + a.first(a.padding_y), x = i % across * kTile + a.first(a.padding_x);
  }
};

template <class A>
Patch<A, kTile> patch_of(const PolyphaseArgs& a, const Tile& t, int phase, int64_t group, const A* zeros) {
  const int64_t step = a.transposed ? 1 : a.stride, apart = a.transposed ? 0 : a.stride == 2 ? 1 : 2;
  const int64_t top = t.y * step + phase / 2 * apart - (a.transposed ? 1 : a.padding_y);
  const int64_t left = t.x * step + phase % 2 * apart - (a.transposed ? 1 : a.padding_x);
  Patch<A, kTile> patch;
  square_of<A, kSide>(static_cast<const A*>(a.x) + t.n * a.batch_step + group * a.K, top, left, step, a.H,
                      a.W, a.pixel_step, zeros, patch.at);
  return patch;
}

template <class A>
void write_tile(const PolyphaseArgs& a, const Tile& t, int phase, int64_t group, const A* p,
                int64_t p_plane) {
  const int64_t step = a.transposed ? 2 : 1, channels = a.groups * a.M;
  const int64_t top = a.transposed ? t.y * 2 + phase / 2 - a.padding_y : t.y;
  const int64_t left = a.transposed ? t.x * 2 + phase % 2 - a.padding_x : t.x;
  int64_t to[kTile * kTile];
  for (int q = 0; q < kTile * kTile; ++q) {
    const int64_t y = top + q / kTile * step, x = left + q % kTile * step;
    const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
    to[q] = inside ? (y * a.width + x) * channels : kOutside;
  }
  A* y = static_cast<A*>(a.y) + t.n * a.height * a.width * channels + group * a.M;
  const A* bias = a.bias ? static_cast<const A*>(a.bias) + group * a.M : nullptr;
  write_pixels<A, kTile>(p, p_plane, a.M, bias, nullptr, y, to, kTile * step * channels);
}

template <bool add, class A>
void products(const PolyphaseArgs& a, const PanelShape<A>& s, int phase, const A* v, const A* u, A* p) {
  for (int64_t f = 0; f < s.frequencies; ++f)
    if (!skipped(a, phase, f)) product_of_frequency<add>(s, f, v, u, p);
    else if (!add) std::fill_n(p + f * s.p_plane, s.p_plane, A(0));
}

template <class A> void conv(const PolyphaseArgs& a, int64_t begin, int64_t end, void* scratch) {
  const PanelShape<A> s = shape_of<A>(a);
  const auto [zeros, v, p] = BlockScratch<A>(s, scratch);
  const A* outside = zeros;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.blocks(), first = item % a.blocks() * a.tiles;
    const int64_t count = std::min(a.tiles, a.all_tiles() - first);
    for (int phase = 0; phase < kPhases; ++phase) {
      const A* u = static_cast<const A*>(a.u) + (group * kPhases + phase) * a.transformed();
      if (phase == 0 || !a.transposed)
        transform_patches<A, kTile>(s, count, v, [&](int64_t i) {
          return patch_of(a, Tile(a, first + i), phase, group, outside);
        });
      if (phase == 0 || a.transposed) products<false>(a, s, phase, v, u, p);
      else products<true>(a, s, phase, v, u, p);
      if (phase == kPhases - 1 || a.transposed)
        for (int64_t i = 0; i < count; ++i)
          write_tile(a, Tile(a, first + i), phase, group, p + i * s.p_row, s.p_plane);
    }
  }
}

template <class A> PolyphasePlan plan(const PolyphaseArgs& a) {
  const PanelShape<A> s = shape_of<A>(a);
  return {s.panels(), BlockScratch<A>::size(s)};
}

}  // namespace

void polyphase_plan(const PolyphaseArgs& a, PolyphasePlan* found) {
  *found = a.wide ? plan<double>(a) : plan<float>(a);
}
void polyphase_weight_kernel(const PolyphaseArgs& a, void* u, int64_t begin, int64_t end) {
  if (a.taps == 9) a.wide ? weights<double, 9>(a, u, begin, end) : weights<float, 9>(a, u, begin, end);
  else a.wide ? weights<double, 16>(a, u, begin, end) : weights<float, 16>(a, u, begin, end);
}
void polyphase_conv_kernel(const PolyphaseArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.wide ? conv<double>(a, begin, end, scratch) : conv<float>(a, begin, end, scratch);
}

}  // namespace smis::SMIS_ISA
