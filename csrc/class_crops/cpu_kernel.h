// The class_crops loops, one set of functions for each instruction set.
#pragma once
#include "class_crops/args.h"

namespace smis {

constexpr int64_t kOverread = 16;  // elements that a register's load may pass a row's end

// Bytes of scratch that one call of a loop needs: rows of the accumulation type, and one row of
// channels-last output where that is streamed.
inline int64_t class_crops_scratch(const ClassCropsArgs& a) {
  const int64_t width = a.W > a.out_w ? a.W : a.out_w, pixel = a.C * a.K;
  const int64_t bytes = a.element == Element::f64 ? 8 : 4;
  return ((6 + 2 * a.K) * width + (a.last && a.stream ? a.out_w * pixel : 0) + kOverread) * bytes;
}

}  // namespace smis

// Boxes of the nonzero pixels of rows [y0, y1) of image n, merged into C + 1 boxes: the last is
// that of the non-finite pixels, which survive every mask. `unknown` receives a label that is no
// class, and is left alone otherwise.
SMIS_DECLARE_KERNEL(class_boxes_rows, const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1,
                    Box* boxes, void* scratch, int64_t* unknown)
// Rows [y0, y1) of the crops of image n.
SMIS_DECLARE_KERNEL(class_crops_rows, const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1,
                    void* scratch)
// Gradient of row y of image n: each source pixel sums the contiguous range that read it.
SMIS_DECLARE_KERNEL(class_crops_backward_row, const ClassCropsArgs& a, int64_t n, int64_t y,
                    void* scratch)
