// label_conv on the CPU: reflected symbols, runs of equal ones, threads. The loop: cpu_kernel.cpp.
#include "common/host.h"
#include "label_conv/cpu_kernel.h"

namespace smis {
namespace {

int64_t reflected(int64_t i, int64_t size) {
  i = i < 0 ? -i : i;
  return i < size ? i : 2 * size - 2 - i;
}

// symbols (N, H, W) int32; table (K, K, S, C), sums (K, S, C) and bias (C) of the accumulation
// type -> rows [first, last) of the output (N, C, last - first, W), channels-last, in `like`'s dtype.
Tensor label_conv(const Tensor& symbols, const Tensor& table, const Tensor& sums, const Tensor& bias,
                  const Tensor& like, int64_t first, int64_t last) {
  const int64_t N = symbols.size(0), H = symbols.size(1), W = symbols.size(2);
  LabelConvArgs a;
  a.element = element_of(like, "label_conv");
  a.K = table.size(0), a.S = table.size(2), a.C = table.size(3), a.W = W;
  if (a.K % 2 == 0 || a.K / 2 >= std::min(H, W))
    refuse("symbols: expected more than ", a.K / 2, " rows and columns for an odd kernel of ", a.K,
           ", got (", H, ", ", W, "); take a larger map or the convolution itself");
  const Tensor map = torch::stable::contiguous(symbols), taps = torch::stable::contiguous(table);
  const Tensor lines = torch::stable::contiguous(sums), offset = torch::stable::contiguous(bias);
  a.table = taps.const_data_ptr();
  a.sums = lines.const_data_ptr();
  a.bias = offset.const_data_ptr();
  a.first = first;
  Tensor out = empty_nchw(N, a.C, last - first, W, true, like);
  a.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  const int64_t pad = a.K / 2, height = last - first + a.K - 1, width = W + a.K - 1;
  Tensor scratch = empty_of(symbols, {2, height, width}, ScalarType::Int);
  auto* padded = static_cast<int32_t*>(scratch.mutable_data_ptr());
  int32_t* runs = padded + height * width;
  for (int64_t n = 0; n < N; ++n) {
    const auto* source = static_cast<const int32_t*>(map.const_data_ptr()) + n * H * W;
    parallel(height, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        const int32_t* from = source + reflected(first + y - pad, H) * W;
        int32_t *to = padded + y * width, *run = runs + y * width;
        for (int64_t x = 0; x < width; ++x) {
          to[x] = from[reflected(x - pad, W)];
          run[x] = x > 0 && to[x] == to[x - 1] ? run[x - 1] + 1 : 1;
        }
      }
    });
    // The window of output row y begins at padded row y - first.
    a.symbols = padded - first * width;
    a.runs = runs - first * width;
    a.out = static_cast<unsigned char*>(out.mutable_data_ptr()) +
            n * (last - first) * W * a.C * int64_t(out.element_size());
    const auto kernel = label_conv_rows_kernel_best();
    parallel(last - first, grain(W * a.C), [&](int64_t begin, int64_t end) {
      kernel(a, first + begin, first + end);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("label_conv", TORCH_BOX(&label_conv));
}

}  // namespace smis
