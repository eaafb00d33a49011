// A conv's weight as it lies in memory.
#pragma once
#include <cstdint>

namespace smis {

// (groups * M, K, taps) in steps (taps K, taps, 1), or (taps K, 1, K) if channels-last. Flipped, it is
// (groups * K, M, taps) with its taps in reverse, (taps, taps M, 1): as an input's gradient reads it.
struct ConvWeight {
  bool wide = false;                 // fp64, else fp32
  int64_t groups = 1, K = 0, M = 0;  // channels and outputs of one group
  int64_t taps = 9;                  // of a kernel
  int64_t out_step = 9, k_step = 9, tap_step = 1;
  bool flipped = false;
  const void* weight = nullptr;

  // Elements of one group's Winograd transform: full vectors of every instruction set, and one row
  // more than needed (at powers of two they would share cache sets).
  int64_t transformed_weight(int64_t frequencies) const {
    return (M + 15) / 16 * 16 * frequencies * (K + 1);
  }
};

}  // namespace smis
