// Scratch of the kernels, in elements of the sums' type; `lanes` channels make a block.
#pragma once
#include "conditional_conv/cpu_kernel.h"

namespace smis {

inline int64_t block_weights(const ConditionalConvArgs& a, int64_t lanes) {
  return 3 * a.tiling.frequencies() * a.u_plane(lanes);
}
inline int64_t products(const ConditionalConvArgs& a, int64_t lanes) {
  return a.tiling.frequencies() * a.m_plane(lanes);
}
inline int64_t block_patch(const ConditionalConvArgs& a, int64_t lanes) {
  return a.tiling.patch_pixels() * lanes;
}
inline int64_t block_output(const ConditionalConvArgs& a, int64_t lanes) {
  return a.tiling.tiles * a.tiling.side * a.tiling.side * lanes;
}
inline int64_t block_scratch(const ConditionalConvArgs& a, int64_t lanes) {
  return block_weights(a, lanes) + products(a, lanes) + 3 * block_patch(a, lanes) +
         block_output(a, lanes);
}

}  // namespace smis
