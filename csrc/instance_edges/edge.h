// The output of instance_edges: what a one is in each dtype; shared by the CPU and CUDA launchers.
#pragma once
#include "common/tensor.h"

namespace smis {
namespace {

struct Edge {
  int64_t bytes;
  uint64_t one;
};

Edge edge_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return {4, 0x3f800000};
    case ScalarType::Double: return {8, 0x3ff0000000000000};
    case ScalarType::Half: return {2, 0x3c00};
    case ScalarType::BFloat16: return {2, 0x3f80};
    case ScalarType::Bool:
    case ScalarType::Byte: return {1, 1};
    default: refuse("dtype: expected a float dtype, bool or uint8; choose one of them");
  }
}

// Calls fn with an unsigned integer of that many bytes.
template <class F> void with_width(int64_t bytes, F&& fn) {
  switch (bytes) {
    case 1: return fn(uint8_t{});
    case 2: return fn(uint16_t{});
    case 4: return fn(uint32_t{});
    default: return fn(uint64_t{});
  }
}

// An empty (N, 1, H, W) for ids (N, H, W).
Tensor edges_like(const Tensor& ids, ScalarType dtype) {
  if (ids.dim() != 3)
    refuse("instance_map: expected (N, H, W), got ", ids.dim(), " dimensions; reshape it");
  return empty_of(ids, {ids.size(0), 1, ids.size(1), ids.size(2)}, dtype);
}

}  // namespace
}  // namespace smis
