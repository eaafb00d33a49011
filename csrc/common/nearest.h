// Nearest interpolation as torch.nn.functional.interpolate rounds it, and its inverse.
// Internal linkage: the file is compiled once per instruction set.
#pragma once
#include "isa.h"

namespace smis {
namespace {

// Stretches `in` pixels over `out`: the scale is rounded to fp32, as interpolate does.
struct Nearest {
  int32_t in, out;
  float scale;

  SMIS_HOST_DEVICE Nearest(int32_t in_, int32_t out_)
      : in(in_), out(out_), scale(float(in_) / float(out_)) {}

  SMIS_HOST_DEVICE int32_t source(int32_t dst) const {
    const int32_t src = int32_t(float(dst) * scale);
    return src < in ? src : in - 1;
  }

  // The first dst that reads `src` or a later pixel; `out` where there is none.
  SMIS_HOST_DEVICE int32_t first(int32_t src) const {
    if (src <= 0) return 0;
    if (src >= in) return out;
    int32_t dst = int32_t(float(src) / scale);
    if (dst > out) dst = out;
    while (dst > 0 && source(dst - 1) >= src) --dst;
    while (dst < out && source(dst) < src) ++dst;
    return dst;
  }
};

}  // namespace
}  // namespace smis
