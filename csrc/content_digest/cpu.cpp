// content_digest on the CPU: blocks of words over the threads, whose sums are added.
#include "content_digest/cpu_kernel.h"

#include <cstring>

#include "common/tensor.h"

namespace smis {
namespace {

constexpr int64_t kWords = 1 << 14;  // of a block: whole runs of the kernel

Tensor content_digest(const Tensor& input) {
  const Tensor x = torch::stable::contiguous(input);
  const int64_t bytes = x.numel() * int64_t(x.element_size()), words = bytes / 4;
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  const auto* word = reinterpret_cast<const uint32_t*>(data);
  const int64_t blocks = (words + kWords - 1) / kWords;
  std::vector<uint64_t> sums(size_t(blocks) + 1);
  const auto kernel = content_digest_kernel_best();
  parallel(blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernel(word, b * kWords, std::min(words, (b + 1) * kWords), &sums[size_t(b)]);
  });
  if (bytes % 4) {  // the last word, filled up with zeros
    std::vector<uint32_t> last(1);
    std::memcpy(last.data(), data + 4 * words, size_t(bytes % 4));
    kernel(last.data() - words, words, words + 1, &sums[size_t(blocks)]);
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  Tensor out = torch::stable::empty({}, ScalarType::Long, std::nullopt, x.device());
  std::memcpy(out.mutable_data_ptr(), &total, sizeof total);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("content_digest", TORCH_BOX(&content_digest));
}

}  // namespace smis
