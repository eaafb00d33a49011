// Arguments of the conditional convolution. All operands are addressed by (image, channel, pixel)
// strides, with either channels or the pixels of a row dense.
//
// The predicted kernels are a 3x3 convolution with many outputs, so they are computed by Winograd's
// F(m x m, 3x3): 16 products of depth D for 2x2 pixels, instead of 36, or 36 for 4x4, instead of 144
// (forward only). `Tiling` cuts the image into tiles of m x m pixels and these into regions, the unit
// of work; `block` is one vector of channels.
// Frequencies are planes, whose sizes are those of v_plane, u_plane and m_plane.
#pragma once
#include <algorithm>

#include "common/operand.h"

namespace smis {

constexpr int64_t kTaps = 3;          // kernel taps of one product: a row of the 3x3 kernel

// A region: `rows` x `cols` tiles, whose patch is what 3x3 taps on its pixels read.
struct Tiling {
  int64_t N = 0, H = 0, W = 0;
  int64_t side = 2;                // pixels of a tile's
  int64_t rows = 1, cols = 1;      // tiles of a region
  int64_t across = 1, down = 1;    // regions of an image
  int64_t tiles = 1;               // of a region, rounded up to full register tiles

  Tiling() = default;
  Tiling(int64_t n, int64_t h, int64_t w, int64_t m) : N(n), H(h), W(w), side(m) {
    const int64_t most = m == 2 ? 64 : 32;  // a region's transformed condition stays in cache
    const int64_t tiles_x = (w + m - 1) / m, tiles_y = (h + m - 1) / m;
    across = (tiles_x + most - 1) / most;
    cols = (tiles_x + across - 1) / across;
    rows = std::min(std::max<int64_t>(most / cols, 1), tiles_y);
    down = (tiles_y + rows - 1) / rows;
    tiles = (rows * cols + 7) / 8 * 8;
  }
  int64_t regions() const { return N * across * down; }
  int64_t patch_height() const { return side * rows + 2; }
  int64_t patch_width() const { return side * cols + 2; }
  int64_t frequencies() const { return (side + 2) * (side + 2); }  // of a transformed tile
  int64_t patch_pixels() const { return patch_height() * patch_width(); }
};

struct ConditionalConvArgs {
  Element element = Element::f32;
  int64_t C = 0, D = 0;
  Tiling tiling;
  Operand x, h, y;               // y: the output, or its gradient
  const void* weight = nullptr;  // (9C, D, 3, 3)
  const void* bias = nullptr;    // (9C) or null
  int64_t first = 0, count = 0;  // the regions at work
  // In the sums' type:
  void* v = nullptr;         // (count, frequencies, tiles, depth): their transformed condition
  void* dv = nullptr;        // its gradient
  void* du = nullptr;        // (blocks, 3, frequencies, depth, 3, lanes): gradient of transformed weights
  void* dbias = nullptr;     // (9C)
  Operand dx, dh;            // zeroed, summed into
  void* dweight = nullptr;   // (9C, D, 3, 3), of the element type

  // Of whole steps of every loop over it: two vectors of 16 lanes at the most.
  int64_t depth() const { return (D + 31) / 32 * 32; }
  // Planes of a frequency: at powers of two, a tile's values would share cache sets.
  int64_t v_plane() const { return tiling.tiles * depth() + 16; }
  int64_t u_plane(int64_t lanes) const { return (depth() * kTaps + 1) * lanes; }
  int64_t m_plane(int64_t lanes) const { return (tiling.tiles * kTaps + 1) * lanes; }
  int64_t transformed() const { return tiling.frequencies() * v_plane(); }  // of one region
};

}  // namespace smis

// lanes: channels of a block. The scratch sizes are in elements of the sums' type.
SMIS_DECLARE_KERNEL(conditional_conv_lanes, Element element, int64_t* lanes)
// Items: regions. `scratch`: patch_pixels * depth.
SMIS_DECLARE_KERNEL(transform_condition_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end, void* scratch)
// Items: (block, region), blocks outermost.
SMIS_DECLARE_KERNEL(conditional_conv_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end, void* scratch)
// Items: blocks. Sums into dx and du, where they are wanted.
SMIS_DECLARE_KERNEL(conditional_conv_backward_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end, void* scratch)
// Items: blocks. Makes dweight of du.
SMIS_DECLARE_KERNEL(finish_weight_gradient_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end)
// Items: regions. Sums into dv.
SMIS_DECLARE_KERNEL(condition_gradient_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end, void* scratch)
// Items: vectors of condition channels. Adds what dv means into dh.
SMIS_DECLARE_KERNEL(finish_condition_gradient_kernel, const ConditionalConvArgs&, int64_t begin, int64_t end, void* scratch)
