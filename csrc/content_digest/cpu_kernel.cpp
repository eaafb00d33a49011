// The loop of the content digest.
#include "content_digest/cpu_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>

#include "common/lanes.h"

namespace smis::SMIS_ISA {
namespace {

constexpr uint64_t kStep = 0x9E3779B97F4A7C15;
constexpr int64_t kRun = 1024;  // words whose factors are read from a table

constexpr std::array<uint32_t, kRun> factors() {
  std::array<uint32_t, kRun> found{};
  for (int64_t j = 0; j < kRun; ++j) found[size_t(j)] = uint32_t(uint64_t(j + 1) * kStep >> 32) | 1;
  return found;
}
alignas(64) constexpr std::array<uint32_t, kRun> kFactors = factors();

// Products of the even 32-bit lanes, 64 bits each: compilers take the slower one of 64 by 64 bits.
#if defined(__AVX512F__)
Vec<uint64_t> even_products(Vec<uint64_t> a, Vec<uint64_t> b) {
  return Vec<uint64_t>(_mm512_mul_epu32(__m512i(a), __m512i(b)));
}
#elif defined(__AVX2__)
Vec<uint64_t> even_products(Vec<uint64_t> a, Vec<uint64_t> b) {
  return Vec<uint64_t>(_mm256_mul_epu32(__m256i(a), __m256i(b)));
}
#elif defined(__x86_64__)
Vec<uint64_t> even_products(Vec<uint64_t> a, Vec<uint64_t> b) {
  return Vec<uint64_t>(_mm_mul_epu32(__m128i(a), __m128i(b)));
}
#else
Vec<uint64_t> even_products(Vec<uint64_t> a, Vec<uint64_t> b) {
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
}
#endif

// The sum of a run's words, each times its factor.
uint64_t whole_run(const uint32_t* run) {
  constexpr int64_t L = Lanes<uint32_t>::n;
  Vec<uint64_t> even = {}, odd = {};
#pragma GCC unroll 4
  for (int64_t j = 0; j < kRun; j += L) {
    const auto word = Vec<uint64_t>(get(run + j)), factor = Vec<uint64_t>(get(&kFactors[size_t(j)]));
    even += even_products(word, factor), odd += even_products(word >> 32, factor >> 32);
  }
  even += odd;
  uint64_t sum = 0;
  for (int64_t i = 0; i < Lanes<uint64_t>::n; ++i) sum += even[i];
  return sum;
}

}  // namespace

void content_digest_kernel(const uint32_t* words, int64_t begin, int64_t end, uint64_t* sum) {
  uint64_t total = 0;
  for (int64_t first = begin / kRun * kRun; first < end; first += kRun) {
    const uint32_t* run = words + first;
    const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(kRun, end - first);
    uint64_t part = 0;
    if (to - from == kRun) part = whole_run(run);
    else
      for (int64_t j = from; j < to; ++j) part += uint64_t(run[j]) * kFactors[size_t(j)];
    const uint64_t m = uint64_t(first / kRun + 1) * kStep;
    total += part * ((m ^ m >> 29) | 1);
  }
  *sum = total;
}

}  // namespace smis::SMIS_ISA
