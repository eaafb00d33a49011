// Arguments of the search for the features that a nearest x2 upsampling repeats.
#pragma once
#include <atomic>

#include "common/isa.h"

namespace smis {

struct UpsamplingSourceArgs {
  bool wide = false;                        // 8 bytes an element, else 4
  bool last = false;                        // the input is (N, H, W, C), else (N, C, H, W)
  int64_t N = 0, C = 0, H = 0, W = 0;       // of the output
  int64_t batch_step = 0, step = 0;         // of the input: from an image, and a plane or pixel, to the next
  const void* from = nullptr;
  void* to = nullptr;                       // (N, H, W, C)
  std::atomic<bool>* differs = nullptr;     // set where four pixels are not alike: nothing more is read
};

}  // namespace smis

// Items: (image, row of the output).
SMIS_DECLARE_KERNEL(upsampling_source_kernel, const UpsamplingSourceArgs&, int64_t begin, int64_t end)
