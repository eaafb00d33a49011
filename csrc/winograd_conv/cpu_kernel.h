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

// The weight's gradient, from features (N, H, W, groups * K) and a gradient (N, height, width, groups * M):
// (groups * M, 9, K). Layouts: gradient.h.
struct WinogradGradientArgs {
  bool wide = false;                     // fp64, else fp32
  int64_t groups = 1, K = 0, M = 0, N = 0, H = 0, W = 0, height = 0, width = 0, padding = 0;
  int64_t x_batch = 0, x_pixel = 0, grad_batch = 0, grad_pixel = 0;  // steps in elements
  const void *x = nullptr, *grad = nullptr;
  void *v = nullptr, *d = nullptr, *dweight = nullptr;
  void* u = nullptr;                     // sums of blocks, or null where there is but one
  int64_t tiles = 0;                     // of a block
  int64_t first = 0, count = 0;          // tiles of this one
  int64_t rows = 0;                      // of an item

  int64_t all_tiles() const { return N * ((height + 1) / 2) * ((width + 1) / 2); }
};

// Items of a block's products, and sizes in elements: of v, d and u, and of one thread's sums.
struct WinogradGradientPlan {
  int64_t items = 0, v = 0, d = 0, u = 0, scratch = 0;
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
SMIS_DECLARE_KERNEL(winograd_gradient_plan, const WinogradGradientArgs&, WinogradGradientPlan*)
// Items: tiles of the block. Writes v and d.
SMIS_DECLARE_KERNEL(winograd_gradient_tiles_kernel, const WinogradGradientArgs&, int64_t begin, int64_t end)
// Items: (group, panel, some rows). Adds to u; with the last tiles writes dweight.
SMIS_DECLARE_KERNEL(winograd_gradient_kernel, const WinogradGradientArgs&, int64_t begin, int64_t end, void* scratch)
