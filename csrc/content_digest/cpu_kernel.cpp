// The loop of the content digest.
#include "content_digest/cpu_kernel.h"

namespace smis::SMIS_ISA {

void content_digest_kernel(const uint32_t* words, int64_t begin, int64_t end, uint64_t* sum) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15;
  uint64_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t m = uint64_t(i + 1) * kStep;
    total += words[i] * ((m ^ m >> 29) | 1);
  }
  *sum = total;
}

}  // namespace smis::SMIS_ISA
