// A (N, C, H, W) operand. "Plane" layout is NCHW with dense planes, "row" layout is NHWC with dense
// channels.
#pragma once
#include "isa.h"

namespace smis {

// Its base and the strides of n, c and of a pixel.
struct Operand {
  void* data = nullptr;
  int64_t n = 0, c = 0, p = 0;
};

namespace {  // one copy for each instruction set

template <class T>
SMIS_HOST_DEVICE inline T* at(const Operand& o, int64_t n, int64_t c, int64_t p) {
  return static_cast<T*>(o.data) + n * o.n + c * o.c + p * o.p;
}

}  // namespace
}  // namespace smis
