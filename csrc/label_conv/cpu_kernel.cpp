// A conv of one-hot planes is a sum of table rows. Where the window moves inside one region its sum
// is the last one; where a row of the window holds one symbol its taps are summed already.
#include "label_conv/cpu_kernel.h"

#include <algorithm>

#include "common/element.h"
#include "common/stream.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kBlock = 64;     // channels summed in registers
constexpr int64_t kPixel = 1024;   // channels of a pixel staged on the stack, else written at once

// sum (+)= row for the n <= kBlock channels of a block.
template <bool first, class A>
inline void add(A* __restrict sum, const A* __restrict row, int64_t n) {
  const auto some = [&](int64_t count) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] = first ? row[j] : sum[j] + row[j];
  };
  n == kBlock ? some(kBlock) : some(n);
}

// Channels [c, c + n) of the window whose corner is (y, x). Each row of the window has a sum of its
// own, as in the table of sums: K + K additions round less than K * K in a chain.
template <class A>
inline void sum_window(const LabelConvArgs& a, int64_t y, int64_t x, int64_t c, int64_t n, A* out) {
  const int64_t padded = a.W + a.K - 1;
  alignas(64) A sum[kBlock], line[kBlock];
  add<true>(sum, static_cast<const A*>(a.bias) + c, n);
  for (int64_t ky = 0; ky < a.K; ++ky) {
    const int32_t* s = a.symbols + (y + ky) * padded + x;
    if (a.runs[(y + ky) * padded + x + a.K - 1] >= a.K) {
      add<false>(sum, static_cast<const A*>(a.sums) + (ky * a.S + s[0]) * a.C + c, n);
      continue;
    }
    const A* taps = static_cast<const A*>(a.table) + ky * a.K * a.S * a.C + c;
    add<true>(line, taps + s[0] * a.C, n);
    for (int64_t kx = 1; kx < a.K; ++kx) add<false>(line, taps + (kx * a.S + s[kx]) * a.C, n);
    add<false>(sum, line, n);
  }
  std::copy(sum, sum + n, out);
}

template <class T> void rows(const LabelConvArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t padded = a.W + a.K - 1;
  alignas(64) A pixel[kPixel];
  alignas(64) T stored[kPixel];
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < a.C; c += kPixel) {
      const int64_t width = std::min(kPixel, a.C - c);
      T* out = static_cast<T*>(a.out) + (y - a.first) * a.W * a.C + c;
      for (int64_t x = 0; x < a.W; ++x, out += a.C) {
        bool repeats = x > 0;
        for (int64_t ky = 0; repeats && ky < a.K; ++ky)
          repeats = a.runs[(y + ky) * padded + x + a.K - 1] > a.K;
        if (!repeats) {
          for (int64_t j = 0; j < width; j += kBlock)
            sum_window(a, y, x, c + j, std::min(kBlock, width - j), pixel + j);
          for (int64_t j = 0; j < width; ++j) store(stored[j], pixel[j]);
        }
        if (a.stream) stream_bytes(out, stored, width * int64_t(sizeof(T)));
        else std::memcpy(out, stored, size_t(width) * sizeof(T));
      }
    }
  if (a.stream) stream_fence();
}

}  // namespace

SMIS_BY_ELEMENT(label_conv_rows_kernel, LabelConvArgs, rows<T>)

}  // namespace smis::SMIS_ISA
