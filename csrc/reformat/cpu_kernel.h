// Arguments of a change of memory format: (N, C, P) planes to (N, P, C) rows of P pixels, or back.
#pragma once
#include "common/isa.h"

namespace smis {

struct ReformatArgs {
  static constexpr int64_t kBlock = 128;  // pixels of an item: their rows stay in the first cache
  int64_t bytes = 4;                      // of an element: 2, 4 or 8
  bool last = true;                       // planes to rows, else rows to planes
  int64_t N = 0, C = 0, P = 0;
  int64_t batch_step = 0, step = 0;       // of the input: from an image, and a plane or row, to the next
  const void* from = nullptr;
  void* to = nullptr;

  int64_t blocks() const { return (P + kBlock - 1) / kBlock; }
};

}  // namespace smis

// Items: (image, block of pixels).
SMIS_DECLARE_KERNEL(reformat_kernel, const ReformatArgs&, int64_t begin, int64_t end)
