// Arguments of 3x3 and 4x4 convolutions by four convolutions of 2x2 kernels, each by Winograd's
// F(3x3, 2x2); features (N, H, W, C).
//
// Along each axis tap 2 j + b of a conv of stride 2 reads the pixels of one parity b: those are a phase,
// which a kernel of two taps j moves over, and the outputs of the phases are added. Taps j + 2 b do the
// same for stride 1. Of a transposed conv the outputs of one parity are a phase. Of three taps the second
// phase has but one: one frequency of its kernel's transform is zero, and its products are left out.
#pragma once
#include "common/conv_weight.h"
#include "common/isa.h"

namespace smis {

struct PolyphaseArgs : ConvWeight {
  int64_t stride = 2, padding_y = 0, padding_x = 0;
  bool transposed = false;                 // of stride 2
  int64_t N = 0, H = 0, W = 0;
  int64_t height = 0, width = 0;           // of the output
  int64_t batch_step = 0, pixel_step = 0;  // of x, in elements
  int64_t tiles = 0;                       // of a block
  const void* x = nullptr;
  const void* bias = nullptr;              // (groups * M) or null
  const void* u = nullptr;                 // of all groups, (groups, phases, ...)
  void* y = nullptr;                       // (N, height, width, groups * M)

  static constexpr int64_t kTile = 3, kFrequencies = 16, kPhases = 4;
  int64_t side() const { return taps == 9 ? 3 : 4; }
  // The first row (or column) of a transposed conv's phases that any output lies in, and their count.
  int64_t first(int64_t padding) const { return transposed ? padding / 2 : 0; }
  int64_t steps(int64_t size, int64_t padding) const {
    return transposed ? (size - 1 + padding) / 2 - first(padding) + 1 : size;
  }
  int64_t tiles_down() const { return (steps(height, padding_y) + kTile - 1) / kTile; }
  int64_t tiles_across() const { return (steps(width, padding_x) + kTile - 1) / kTile; }
  int64_t all_tiles() const { return N * tiles_down() * tiles_across(); }
  int64_t blocks() const { return (all_tiles() + tiles - 1) / tiles; }
  // Elements of a phase's u of one group; ops/polyphase_conv/op.py makes the same sum.
  int64_t transformed() const { return transformed_weight(kFrequencies); }
};

// Panels of a group, and the elements of a thread's scratch.
struct PolyphasePlan {
  int64_t panels = 0, scratch = 0;
};

}  // namespace smis

SMIS_DECLARE_KERNEL(polyphase_plan, const PolyphaseArgs&, PolyphasePlan*)
// Items: (group, panel). Writes u.
SMIS_DECLARE_KERNEL(polyphase_weight_kernel, const PolyphaseArgs&, void* u, int64_t begin, int64_t end)
// Items: (group, block of tiles), groups outermost.
SMIS_DECLARE_KERNEL(polyphase_conv_kernel, const PolyphaseArgs&, int64_t begin, int64_t end, void* scratch)
