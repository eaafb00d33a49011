// A CPU tensor in another memory format, for every op whose kernels read one of them.
#pragma once
#include "common/tensor.h"
#include "reformat/cpu_kernel.h"

namespace smis {

// Bytes of an element that the kernel moves, of float64, float32 and 16-bit types; 0 of others.
inline int64_t moved_bytes(ScalarType type) {
  if (type == ScalarType::Double) return 8;
  if (type == ScalarType::Float) return 4;
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? 2 : 0;
}

// The values in (N, H, W, C) with `last`, else in (N, C, H, W), without gaps. The kernel takes floats that
// lie in the other one, slices of batches and channels too; torch copies everything else.
inline Tensor reformatted(const Tensor& t, bool last) {
  const int64_t bytes = moved_bytes(t.scalar_type());
  const int64_t pixels = t.size(2) * t.size(3);
  const bool serves = bytes != 0 && t.numel() != 0 && t.size(1) > 1 && pixels > 1 &&
                      (last ? planes_dense(t) : rows_dense(t));
  if (!serves || (last ? rows_dense(t) : planes_dense(t)))
    return torch::stable::contiguous(t, last ? torch::headeronly::MemoryFormat::ChannelsLast
                                             : torch::headeronly::MemoryFormat::Contiguous);
  Tensor out = empty_nchw(t.size(0), t.size(1), t.size(2), t.size(3), last, t);
  ReformatArgs a;
  a.bytes = bytes, a.last = last;
  a.N = t.size(0), a.C = t.size(1), a.P = pixels;
  a.batch_step = t.stride(0), a.step = t.stride(last ? 1 : t.size(3) > 1 ? 3 : 2);
  a.from = t.const_data_ptr(), a.to = out.mutable_data_ptr();
  const auto kernel = reformat_kernel_best();
  parallel(a.N * a.blocks(), grain(a.C * ReformatArgs::kBlock), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace smis
