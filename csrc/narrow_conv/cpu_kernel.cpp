// A few pixels of a row at a time. Layouts: cpu_kernel.h.
#include "narrow_conv/cpu_kernel.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/element.h"
#include "common/lanes.h"
#include "common/transposed.h"

namespace smis::SMIS_ISA {
namespace {

// Pixels whose sums and inputs fill the registers beside a vector of weights.
constexpr int pixels_of(int outputs) { return outputs == 1 ? 6 : outputs == 2 ? 4 : outputs == 3 ? 3 : 2; }

// What all lanes sum to, in each of them.
template <int step, class V, int... j> inline V turned(V v, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  return shuffled(v, v, std::integer_sequence<int, ((j + step) % n)...>{});
}
template <class A, int step = int(Lanes<A>::n) / 2> inline Vec<A> summed(Vec<A> v) {
  if constexpr (step == 0) return v;
  else return summed<A, step / 2>(v + turned<step>(v, std::make_integer_sequence<int, int(Lanes<A>::n)>{}));
}

// sum[p][m] over one vector of channels and a row of taps; `x` its first pixel, `w` its first weights.
// `S` is the side where it is known beforehand, else 0.
template <int S, class A, int M, int P, class Read>
__attribute__((always_inline)) inline void add_row(Vec<A> (&sum)[P][M], const A* x, int64_t pixel,
                                                   const A* w, int64_t output, int64_t C, int64_t side,
                                                   const Read& read) {
#pragma GCC unroll 3
  for (int64_t j = 0; j < (S ? S : side); ++j, x += pixel, w += C) {
    Vec<A> in[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) in[p] = read(x + p * pixel);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<A> weight = read(w + m * output);
#pragma GCC unroll 6
      for (int p = 0; p < P; ++p) sum[p][m] += in[p] * weight;
    }
  }
}

template <class A, int M, int S> void rows(const NarrowArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<A>::n;
  constexpr int P = pixels_of(M);
  const int64_t height = a.height(), width = a.width(), side = a.side, output = side * side * a.C;
  const int64_t whole = a.C / L * L, rest = a.C - whole, across = side + P - 1;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  std::vector<A> patch(size_t(side * across * a.C));  // of pixels that lie at a border
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / height, top = item % height - a.padding;
    const A* image = static_cast<const A*>(a.x) + n * a.batch_step;
    A* out = static_cast<A*>(a.y) + item * width * M;
    const bool rows_inside = top >= 0 && top + side <= a.H;
    for (int64_t x = 0; x < width; x += P) {
      const int64_t left = x - a.padding;
      const A* first = image + (top * a.W + left) * a.pixel_step;
      int64_t pixel = a.pixel_step, line = a.W * a.pixel_step;
      if (!rows_inside || left < 0 || left + across > a.W) {
        for (int64_t i = 0; i < side * across; ++i) {
          const int64_t row = top + i / across, column = left + i % across;
          const bool inside = row >= 0 && row < a.H && column >= 0 && column < a.W;
          A* to = patch.data() + i * a.C;
          if (inside) std::copy_n(image + (row * a.W + column) * a.pixel_step, a.C, to);
          else std::fill_n(to, a.C, A(0));
        }
        first = patch.data(), pixel = a.C, line = across * a.C;
      }
      Vec<A> sum[P][M] = {};
      for (int64_t i = 0; i < side; ++i) {
        const A* in = first + i * line;
        const A* w = weight + i * side * a.C;
        for (int64_t c = 0; c < whole; c += L)
          add_row<S>(sum, in + c, pixel, w + c, output, a.C, side, [](const A* p) { return get(p); });
        if (rest != 0)
          add_row<S>(sum, in + whole, pixel, w + whole, output, a.C, side,
                     [&](const A* p) { return get_some(p, rest); });
      }
      const int64_t count = std::min<int64_t>(P, width - x);
      for (int64_t p = 0; p < count; ++p)
        for (int m = 0; m < M; ++m)
          out[(x + p) * M + m] = summed<A>(sum[p][m])[0] + (bias ? bias[m] : A(0));
    }
  }
}

template <class A, int M> void outputs(const NarrowArgs& a, int64_t begin, int64_t end) {
  a.side == 3 ? rows<A, M, 3>(a, begin, end) : rows<A, M, 0>(a, begin, end);
}

template <class A> void conv(const NarrowArgs& a, int64_t begin, int64_t end) {
  if (a.M == 1) outputs<A, 1>(a, begin, end);
  else if (a.M == 2) outputs<A, 2>(a, begin, end);
  else if (a.M == 3) outputs<A, 3>(a, begin, end);
  else outputs<A, 4>(a, begin, end);
}

}  // namespace

void narrow_conv_kernel(const NarrowArgs& a, int64_t begin, int64_t end) {
  a.wide ? conv<double>(a, begin, end) : conv<float>(a, begin, end);
}

}  // namespace smis::SMIS_ISA
