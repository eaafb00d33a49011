// What cpu.cpp and cuda.cu files share beside the stable ABI: operands, memory formats, grain.
#pragma once
#include "operand.h"
#include "tensor.h"
#ifndef USE_CUDA
#include "reformat/host.h"
#endif

namespace smis {

// The tensor itself where its layout is the wanted one, else a copy.
inline Tensor laid_out(const Tensor& t, bool last) {
  if (last ? rows_dense(t) : planes_dense(t)) return t;
#ifdef USE_CUDA
  return torch::stable::contiguous(t, last ? torch::headeronly::MemoryFormat::ChannelsLast
                                           : torch::headeronly::MemoryFormat::Contiguous);
#else
  return reformatted(t, last);
#endif
}

inline Operand operand(const Tensor& t) {
  // Height 1 or width 1: the other axis carries the pixel stride.
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(t.size(3) > 1 ? 3 : 2)};
}

// Two sums for each channel of each image, or nothing where they are not wanted.
inline Tensor empty_sums(const Tensor& x, bool wanted) {
  if (!wanted) return empty_of(x, {0}, acc_type(x));
  return empty_of(x, {2, x.size(0), x.size(1)}, acc_type(x));
}

// The same from partial sums (N, chunks, 2, C).
inline void sum_chunks(const Tensor& partial, Tensor& sums) {
  const int64_t over[] = {1};
  const Tensor summed = torch::stable::sum(
      partial, torch::headeronly::IntHeaderOnlyArrayRef(over, 1), false);  // [N, 2, C]
  torch::stable::copy_(sums, torch::stable::transpose(summed, 0, 1));
}

}  // namespace smis
