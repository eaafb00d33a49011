// The label_conv loop, one function for each instruction set.
#pragma once
#include "common/isa.h"

namespace smis {

struct LabelConvArgs {
  Element element = Element::f32;
  int64_t C = 0, W = 0, K = 0, S = 0;   // output channels and width, kernel size, table rows a tap
  const int32_t* symbols = nullptr;     // (H + K - 1, W + K - 1) of one image, reflected at borders
  const int32_t* runs = nullptr;        // the same: equal symbols that end there, itself included
  const void* table = nullptr;          // (K, K, S, C) of the accumulation type
  const void* sums = nullptr;           // (K, S, C): taps of one kernel row together
  const void* bias = nullptr;           // (C)
  void* out = nullptr;                  // (rows, W, C), of row `first` on
  int64_t first = 0;
  bool stream = false;                  // the output is too large to stay in cache: write past it
};

}  // namespace smis

// Output rows [begin, end).
SMIS_DECLARE_KERNEL(label_conv_rows_kernel, const LabelConvArgs&, int64_t begin, int64_t end)
