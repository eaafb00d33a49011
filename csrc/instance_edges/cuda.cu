// instance_edges on CUDA: one pass, a thread per pixel; neighbours come from the caches.
#include "common/cuda.h"
#include "instance_edges/edge.h"

namespace smis::cuda {
namespace {

template <class Id, class Out>
__global__ void edges_kernel(const Id* ids, int64_t batch, int32_t height, int32_t width,
                             int64_t sn, int64_t sh, int64_t sw, Out one, Out* out) {
  const int32_t pixels = height * width;
  for (int64_t n = blockIdx.y; n < batch; n += gridDim.y)
    for (int64_t i = thread_index(); i < pixels; i += thread_stride()) {
      const int32_t y = int32_t(i) / width, x = int32_t(i) - y * width;
      const Id* p = ids + n * sn + y * sh + x * sw;
      const Id v = *p;
      const bool edge = (x > 0 && p[-sw] != v) || (x < width - 1 && p[sw] != v) ||
                        (y > 0 && p[-sh] != v) || (y < height - 1 && p[sh] != v);
      out[n * pixels + i] = edge ? one : Out(0);
    }
}

Tensor instance_edges(const Tensor& instance_map, ScalarType dtype) {
  const Launch launch(instance_map, "instance_edges");
  Tensor out = edges_like(instance_map, dtype);
  if (out.numel() == 0) return out;
  const int64_t batch = out.size(0), height = out.size(2), width = out.size(3);
  check_plane("instance_map", height, width);
  const Edge edge = edge_of(dtype);
  with_width(int64_t(instance_map.element_size()), [&](auto id) {
    with_width(edge.bytes, [&](auto value) {
      using Id = decltype(id);
      using Out = decltype(value);
      edges_kernel<Id, Out><<<grid(height * width, batch), kThreads, 0, launch.stream>>>(
          static_cast<const Id*>(instance_map.const_data_ptr()), batch, int32_t(height),
          int32_t(width), instance_map.stride(0), instance_map.stride(1), instance_map.stride(2),
          Out(edge.one), static_cast<Out*>(out.mutable_data_ptr()));
    });
  });
  launch.check();
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("instance_edges", TORCH_BOX(&instance_edges));
}

}  // namespace
}  // namespace smis::cuda
