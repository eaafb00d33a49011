// The operands of class_crops on any device. Strides count elements; a crop has K channels.
#pragma once
#include "common/ids.h"
#include "common/nearest.h"

namespace smis {

// A class's box, ends exclusive; empty where the class is absent.
struct Box {
  int32_t y0, y1, x0, x1;
};

// A strided (N, C, H, W) operand.
struct Strided {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

namespace {

template <class T>
SMIS_HOST_DEVICE inline T* at(const Strided& t, int64_t n, int64_t c, int64_t y, int64_t x) {
  return static_cast<T*>(t.data) + n * t.n + c * t.c + y * t.h + x * t.w;
}

}  // namespace

struct ClassCropsArgs {
  Element element = Element::f32;
  bool planes = false;    // a mask for each class, else integer labels
  Ids labels = Ids::u8;
  int64_t N = 0, K = 0, H = 0, W = 0, C = 0;  // image (N, K, H, W), C classes
  int64_t out_h = 0, out_w = 0;
  Strided image;      // read forward, written by the backward loop
  Strided semantics;  // c is 0 for labels
  Strided crops;      // (N, C*K, out_h, out_w): written forward, read backward
  bool last = false;  // crops is written (N, out_h, out_w, C*K)
  bool stream = false;  // crops are too large to stay in cache: write past it
  const Box* boxes = nullptr;  // (N, C)
};

}  // namespace smis
