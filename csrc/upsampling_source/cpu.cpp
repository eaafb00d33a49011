// CPU implementation of the features that a nearest x2 upsampling repeats.
#include "common/tensor.h"
#include "upsampling_source/cpu_kernel.h"

namespace smis {
namespace {

// ((N, C, H, W) channels-last, whether the (N, C, 2H, 2W) input is its upsampling): else it is not filled.
std::tuple<Tensor, Tensor> upsampling_source(const Tensor& input) {
  const ScalarType type = input.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    refuse("input: expected dtype float32 or float64; cast it first");
  if (input.size(2) % 2 != 0 || input.size(3) % 2 != 0)
    refuse("input: expected an even height and width, got ", input.size(2), " x ", input.size(3));
  if (input.numel() != 0 && !planes_dense(input) && !rows_dense(input))
    refuse("input: expected dense planes or channels, got other strides; copy it first");
  UpsamplingSourceArgs a;
  a.N = input.size(0), a.C = input.size(1), a.H = input.size(2) / 2, a.W = input.size(3) / 2;
  Tensor out = empty_nchw(a.N, a.C, a.H, a.W, true, input);
  Tensor same = empty_of(input, {}, ScalarType::Bool);
  std::atomic<bool> differs = false;
  if (input.numel() != 0) {
    a.wide = type == ScalarType::Double, a.last = !planes_dense(input);
    a.batch_step = input.stride(0), a.step = input.stride(a.last ? 3 : 1);
    a.from = input.const_data_ptr(), a.to = out.mutable_data_ptr(), a.differs = &differs;
    const auto kernel = upsampling_source_kernel_best();
    parallel(a.N * a.H, grain(4 * a.W * a.C), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  *static_cast<bool*>(same.mutable_data_ptr()) = !differs;
  return {out, same};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) { m.impl("upsampling_source", TORCH_BOX(&upsampling_source)); }

}  // namespace smis
