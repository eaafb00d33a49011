// Arguments of a block's shortcut, a 1x1 conv of features modulated by rows of a table (N, H, W, C):
// y = W (x-hat (1 + gamma) + beta).
//
// A pixel's features and a row of the table make a pair; pixels of a pair have one output. Features that
// are upsampled give 2x2 pixels, which mostly see one window: one pair. Pairs are modulated, `tiles` at
// a time, to v[pair][k], multiplied with the weights u[panel][k][column], and the products
// p[pair][column] copied to their pixels. Modulated features are never in memory.
#pragma once
#include "common/conv_weight.h"
#include "common/isa.h"

namespace smis {

struct ShortcutArgs : ConvWeight {
  int64_t N = 0, H = 0, W = 0;             // of x
  bool upsample = false, stream = false;   // `stream`: y would not stay in cache
  int64_t batch_step = 0, pixel_step = 0;  // of x, in elements
  int64_t tiles = 0, stat_step = 0;
  const void *x = nullptr, *mean = nullptr, *rstd = nullptr, *table = nullptr;  // rows [gamma | beta]
  const int32_t* index = nullptr;          // (N, up H, up W)
  const void* u = nullptr;                 // of all groups
  void* y = nullptr;                       // (N, up H, up W, groups * M)

  // Threads take ranges of blocks: neighbours lie apart, for some parts of a picture have more pairs.
  int64_t block = 1;                       // pixels of x
  int64_t apart = 1;                       // without a factor in common with blocks()

  int64_t pixels() const { return N * H * W; }
  int64_t blocks() const { return (pixels() + block - 1) / block; }
  int64_t first_pixel(int64_t item) const { return item * apart % blocks() * block; }
  int64_t channels() const { return groups * K; }
  int64_t transformed() const { return transformed_weight(1); }
};

// Panels of a group, and a thread's scratch in elements.
struct ShortcutPlan {
  int64_t panels = 0, scratch = 0;
};

}  // namespace smis

SMIS_DECLARE_KERNEL(shortcut_plan, const ShortcutArgs&, ShortcutPlan*)
// Items: (group, panel). Writes u.
SMIS_DECLARE_KERNEL(shortcut_weight_kernel, const ShortcutArgs&, void* u, int64_t begin, int64_t end)
// Items: blocks of pixels of x.
SMIS_DECLARE_KERNEL(shortcut_kernel, const ShortcutArgs&, int64_t begin, int64_t end, void* scratch)
