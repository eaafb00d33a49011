// The loops of instance_pool: runs of equal ids are found once; sums and the way back follow them.
#include "instance_pool/cpu_kernel.h"

#include "instance_pool/rows.h"
#include "instance_pool/spread.h"
#include "instance_pool/sums.h"

namespace smis::SMIS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kStep = 16;

// One past each of the first 16 pixels whose right neighbour differs, without a branch.
template <class I> int32_t* step_ends(const I* ids, int64_t p, int32_t* ends) {
  const I *a = ids + p, *b = a + 1;
  __mmask16 differs;
  if constexpr (sizeof(I) == 8) {
    const auto eight = [&](int i) {
      return _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
    };
    differs = __mmask16(eight(0) | eight(8) << 8);
  } else if constexpr (sizeof(I) == 4) {
    differs = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
  } else if constexpr (sizeof(I) == 2) {
    differs = _mm256_cmpneq_epi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  } else {
    differs = _mm_cmpneq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  }
  const __m512i next = _mm512_add_epi32(
      _mm512_set_epi32(16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1),
      _mm512_set1_epi32(int32_t(p)));
  _mm512_storeu_si512(ends, _mm512_maskz_compress_epi32(differs, next));
  return ends + __builtin_popcount(differs);
}
#else
constexpr int64_t kStep = 8;

template <class I> int32_t* step_ends(const I* ids, int64_t p, int32_t* ends) {
  uint8_t differs[kStep];
#pragma omp simd
  for (int64_t i = 0; i < kStep; ++i) differs[i] = ids[p + i] != ids[p + i + 1];
  uint64_t any;
  std::memcpy(&any, differs, sizeof(any));
  if (any == 0) return ends;
  for (int64_t i = 0; i < kStep; ++i)
    if (differs[i]) *ends++ = int32_t(p + i + 1);
  return ends;
}
#endif

template <class I> int64_t find_runs(const I* ids, int64_t begin, int64_t end, int32_t* ends) {
  int32_t* next = ends;
  int64_t p = begin;
  for (; p + kStep < end; p += kStep) next = step_ends(ids, p, next);
  for (; p + 1 < end; ++p)
    if (ids[p] != ids[p + 1]) *next++ = int32_t(p + 1);
  if (end > begin) *next++ = int32_t(end);
  return next - ends;
}

}  // namespace

void instance_runs_kernel(Ids type, const void* ids, int64_t begin, int64_t end, int32_t* ends,
                          int64_t* count) {
  with_ids(type, [&](auto tag) {
    *count = find_runs(static_cast<const decltype(tag)*>(ids), begin, end, ends);
  });
}

void instance_merge(const InstancePoolArgs& a, const Merge& m, int64_t begin, int64_t end) {
  with_element(a.mean_element, [&](auto tag) { merge<decltype(tag)>(a, m, begin, end); });
}

#define SMIS_BY_STRIPE(name, call)                                                              \
  void name(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {            \
    with_element(a.element, [&](auto tag) { call<decltype(tag)>(a, s, begin, end); });           \
  }
SMIS_BY_STRIPE(instance_sums_planes, sums_planes)
SMIS_BY_STRIPE(instance_sums_rows, sums_rows)
SMIS_BY_STRIPE(instance_spread_planes, spread_planes)
SMIS_BY_STRIPE(instance_spread_rows, spread_rows)

}  // namespace smis::SMIS_ISA
