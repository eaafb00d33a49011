// instance_edges on the CPU: an id is an integer of 1, 2, 4 or 8 bytes, an edge is the bits of one.
#include <cstring>

#include "common/tensor.h"
#include "instance_edges/edge.h"

namespace smis {
namespace {

// SSE2 compares no 64-bit integers.
template <class Id> bool differs(Id bits) { return bits != 0; }
template <> bool differs(uint64_t bits) { return uint32_t(bits | bits >> 32) != 0; }

template <class Id, class Out>
void edge_row(const Id* row, const Id* above, const Id* below, int64_t step, int64_t width,
              Out one, Out* out) {
  const auto edge = [&](int64_t x, int64_t left, int64_t right) {
    const Id v = row[x * step];
    return differs(Id((v ^ row[left * step]) | (v ^ row[right * step]) | (v ^ above[x * step]) |
                      (v ^ below[x * step]))) ? one : Out(0);
  };
  out[0] = edge(0, 0, std::min<int64_t>(1, width - 1));
  for (int64_t x = 1; x < width - 1; ++x) out[x] = edge(x, x - 1, x + 1);
  if (width > 1) out[width - 1] = edge(width - 1, width - 2, width - 1);
}

template <class Id, class Out>
void edge_rows(const Tensor& ids, Tensor& out, uint64_t one) {
  const int64_t N = ids.size(0), H = ids.size(1), W = ids.size(2);
  const int64_t sn = ids.stride(0), sh = ids.stride(1), sw = ids.stride(2);
  const auto* in = static_cast<const Id*>(ids.const_data_ptr());
  auto* result = static_cast<Out*>(out.mutable_data_ptr());
  parallel(N * H, 32768 / std::max<int64_t>(W, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % H;
      const Id* row = in + i / H * sn + y * sh;
      edge_row(row, y > 0 ? row - sh : row, y < H - 1 ? row + sh : row, sw, W, Out(one),
               result + i * W);
    }
  });
}

Tensor instance_edges(const Tensor& instance_map, ScalarType dtype) {
  Tensor out = edges_like(instance_map, dtype);
  if (out.numel() == 0) return out;
  const Edge edge = edge_of(dtype);
  with_width(int64_t(instance_map.element_size()), [&](auto id) {
    with_width(edge.bytes, [&](auto value) {
      edge_rows<decltype(id), decltype(value)>(instance_map, out, edge.one);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("instance_edges", TORCH_BOX(&instance_edges));
}

}  // namespace
}  // namespace smis
