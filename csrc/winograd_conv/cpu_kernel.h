// Arguments of the 3x3 convolution by Winograd's F(m x m, 3x3), m 2 or 4, features (N, H, W, C).
//
// Each m x m pixels of the output are a tile. A block of tiles is transformed to v[f][tile][k], for
// each of the (m + 2)^2 frequencies f multiplied with the kernels' u[panel][f][k][column], and the
// products p[f][tile][column] are transformed back. A panel is what the register tile takes of the
// outputs. Where there are few tiles a panel's kernels are transformed where they are multiplied, by
// all tiles, and are never in memory.
#pragma once
#include "common/conv_weight.h"
#include "common/isa.h"

namespace smis {

struct WinogradArgs : ConvWeight {
  int64_t tile = 2;                        // m
  int64_t N = 0, H = 0, W = 0, padding = 0;
  int64_t batch_step = 0, pixel_step = 0;  // of x, in elements
  int64_t tiles = 0;                       // of a block
  const void* x = nullptr;
  const void* bias = nullptr;              // (groups * M) or null
  const void* residual = nullptr;          // as y, added to it; or null
  const void* u = nullptr;                 // of all groups
  void* y = nullptr;                       // (N, height, width, groups * M)

  int64_t height() const { return H + 2 * padding - 2; }
  int64_t width() const { return W + 2 * padding - 2; }
  int64_t tiles_down() const { return (height() + tile - 1) / tile; }
  int64_t tiles_across() const { return (width() + tile - 1) / tile; }
  int64_t all_tiles() const { return N * tiles_down() * tiles_across(); }
  int64_t blocks() const { return (all_tiles() + tiles - 1) / tiles; }
  int64_t frequencies() const { return (tile + 2) * (tile + 2); }
  // Elements of u for one group; ops/winograd_conv/op.py makes the same sum.
  int64_t transformed() const { return transformed_weight(frequencies()); }
};

// Panels of a group, and sizes in elements: a thread's scratch for blocks of tiles; where weights are
// streamed, the transformed tiles of a group, and a thread's scratch.
struct WinogradPlan {
  int64_t panels = 0, scratch = 0, group_tiles = 0, panel_scratch = 0;
};

}  // namespace smis

SMIS_DECLARE_KERNEL(winograd_plan, const WinogradArgs&, WinogradPlan*)
// Items: (group, panel). Writes u.
SMIS_DECLARE_KERNEL(winograd_weight_kernel, const WinogradArgs&, void* u, int64_t begin, int64_t end)
// Items: (group, block of tiles), groups outermost.
SMIS_DECLARE_KERNEL(winograd_conv_kernel, const WinogradArgs&, int64_t begin, int64_t end, void* scratch)
// Items: (group, tile), `tiles` of them, those after the last zero. Writes v.
SMIS_DECLARE_KERNEL(winograd_tiles_kernel, const WinogradArgs&, void* v, int64_t begin, int64_t end)
// Items: (group, panel). Multiplies all tiles with weights that it transforms itself.
SMIS_DECLARE_KERNEL(winograd_streamed_kernel, const WinogradArgs&, const void* v, int64_t begin, int64_t end, void* scratch)
