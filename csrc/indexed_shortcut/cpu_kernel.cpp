// Pairs of a pixel's features and a row of the table, some at a time: modulated, multiplied, copied to
// their pixels. Layouts: cpu_kernel.h.
#include "indexed_shortcut/cpu_kernel.h"

#include <vector>

#include "common/modulate.h"
#include "common/winograd_panels.h"

namespace smis::SMIS_ISA {
namespace {

template <class A> PanelShape<A> shape_of(const ShortcutArgs& a) { return {1, a.K, a.M, a.tiles}; }

template <class A> void weights(const ShortcutArgs& a, void* u, int64_t begin, int64_t end) {
  const PanelShape<A> s = shape_of<A>(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / s.panels(), first = item % s.panels() * kPanelVectors;
    A* to = static_cast<A*>(u) + group * a.transformed() + s.panel_offset(first);
    with_panel(s, first, [&](auto vecs) {
      for (int64_t v = 0; v < vecs(); ++v) {
        const int64_t output = (first + v) * s.L;
        const A* from = static_cast<const A*>(a.weight) + (group * a.M + output) * a.K;
        transposed(from, a.K, std::min(s.L, a.M - output), a.K,
                   [&](int64_t k) { return to + (k * vecs() + v) * s.L; });
      }
    });
  }
}

struct Pair {
  int64_t n, source;  // pixel of x
  int32_t row;
  int pixels = 0;
  int64_t at[4];  // of y
};

template <class A> class Shortcut {
 public:
  Shortcut(const ShortcutArgs& a, void* scratch) : a_(a), s_(shape_of<A>(a)), scratch_(s_, scratch) {
    pairs_.reserve(size_t(a.tiles));
  }

  // The pairs of one pixel of x.
  void add(int64_t pixel) {
    const int64_t up = a_.upsample ? 2 : 1, each = a_.H * a_.W, n = pixel / each;
    const int64_t y = pixel % each / a_.W * up, x = pixel % a_.W * up, width = a_.W * up;
    const size_t before = pairs_.size();
    for (int64_t q = 0; q < up * up; ++q) {
      const int64_t at = n * each * up * up + (y + q / 2) * width + x + q % 2;
      const int32_t row = a_.index[at];
      size_t i = before;
      while (i < pairs_.size() && pairs_[i].row != row) ++i;
      if (i == pairs_.size()) pairs_.push_back({n, pixel % each, row, 0, {}});
      pairs_[i].at[pairs_[i].pixels++] = at;
    }
    if (int64_t(pairs_.size()) + 4 > a_.tiles) flush();
  }

  void flush() {
    const int64_t count = int64_t(pairs_.size());
    s_.tiles = (count + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t group = 0; group < a_.groups && count > 0; ++group) {
      for (int64_t i = 0; i < count; ++i) modulate(pairs_[size_t(i)], group * a_.K, scratch_.v + i * s_.depth);
      const A* u = static_cast<const A*>(a_.u) + group * a_.transformed();
      product_of_frequency<false>(s_, 0, scratch_.v, u, scratch_.p);
      for (int64_t i = 0; i < count; ++i) write(pairs_[size_t(i)], group * a_.M, scratch_.p + i * s_.p_row);
    }
    pairs_.clear();
  }

 private:
  void modulate(const Pair& pair, int64_t channel, A* v) const {
    const A* x = static_cast<const A*>(a_.x) + pair.n * a_.batch_step + pair.source * a_.pixel_step + channel;
    const int64_t stat = pair.n * a_.stat_step + channel;
    const PerChannel<A> stats{static_cast<const A*>(a_.mean) + stat, static_cast<const A*>(a_.rstd) + stat};
    const A* g = static_cast<const A*>(a_.table) + pair.row * 2 * a_.channels() + channel;
    apply_run<Act::none>(x, stats, g, g + a_.channels(), v, A(1), a_.K);
  }

  void write(const Pair& pair, int64_t output, const A* p) const {
    for (int q = 0; q < pair.pixels; ++q) {
      A* y = static_cast<A*>(a_.y) + pair.at[q] * a_.groups * a_.M + output;
      if (a_.stream) stream_out(y, p, a_.M);
      else std::copy_n(p, a_.M, y);
    }
  }

  const ShortcutArgs& a_;
  PanelShape<A> s_;
  BlockScratch<A> scratch_;
  std::vector<Pair> pairs_;
};

template <class A> void shortcut(const ShortcutArgs& a, int64_t begin, int64_t end, void* scratch) {
  Shortcut<A> pairs(a, scratch);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = a.first_pixel(item), last = std::min(first + a.block, a.pixels());
    for (int64_t pixel = first; pixel < last; ++pixel) pairs.add(pixel);
  }
  pairs.flush();
  if (a.stream) stream_fence();
}

template <class A> ShortcutPlan plan(const ShortcutArgs& a) {
  const PanelShape<A> s = shape_of<A>(a);
  return {s.panels(), BlockScratch<A>::size(s)};
}

}  // namespace

void shortcut_plan(const ShortcutArgs& a, ShortcutPlan* found) {
  *found = a.wide ? plan<double>(a) : plan<float>(a);
}
void shortcut_weight_kernel(const ShortcutArgs& a, void* u, int64_t begin, int64_t end) {
  a.wide ? weights<double>(a, u, begin, end) : weights<float>(a, u, begin, end);
}
void shortcut_kernel(const ShortcutArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.wide ? shortcut<double>(a, begin, end, scratch) : shortcut<float>(a, begin, end, scratch);
}

}  // namespace smis::SMIS_ISA
