// The loops of instance_pool: runs of equal ids are found once; sums and the way back follow them.
#include "instance_pool/cpu_kernel.h"

#include <algorithm>

#include "common/element.h"
#include "common/stream.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kChunk = 1024;      // values summed in the narrow type before a bin in fp64
constexpr int64_t kRowPixels = 64;    // the same where each channel is summed one by one
constexpr int64_t kBufferBytes = 4096;

template <class F> void with_ids(Ids type, F&& f) {
  switch (type) {
    case Ids::u8: return f(uint8_t{});
    case Ids::i8: return f(int8_t{});
    case Ids::i16: return f(int16_t{});
    case Ids::u16: return f(uint16_t{});
    case Ids::i32: return f(int32_t{});
    case Ids::i64: return f(int64_t{});
  }
}

template <class I>
int64_t count_runs(const I* ids, int64_t begin, int64_t end) {
  int64_t runs = end > begin ? 1 : 0;
  for (int64_t p = begin; p + 1 < end; p += kChunk) {
    const int64_t stop = std::min(p + kChunk, end - 1);
    int32_t changes = 0;
#pragma omp simd reduction(+ : changes)
    for (int64_t i = p; i < stop; ++i) changes += ids[i] != ids[i + 1];
    runs += changes;
  }
  return runs;
}

template <class I>
void find_runs(const I* ids, int64_t begin, int64_t end, int32_t* ends) {
  constexpr int64_t kBlock = 32;  // most blocks lie inside one run
  int64_t p = begin;
  for (; p + kBlock < end; p += kBlock) {
    I differs = 0;
#pragma omp simd reduction(| : differs)
    for (int64_t i = p; i < p + kBlock; ++i) differs |= I(ids[i] ^ ids[i + 1]);
    if (differs == 0) continue;
    for (int64_t i = p; i < p + kBlock; ++i)
      if (ids[i] != ids[i + 1]) *ends++ = int32_t(i + 1);
  }
  for (; p + 1 < end; ++p)
    if (ids[p] != ids[p + 1]) *ends++ = int32_t(p + 1);
  if (end > begin) *ends = int32_t(end);
}

template <class T> T* at(const Operand& o, int64_t n, int64_t c, int64_t p) {
  return static_cast<T*>(o.data) + n * o.n + c * o.c + p * o.p;
}

template <class T>
void sums_planes(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A buffer[kChunk];
  for (int64_t c = begin; c < end; ++c) {
    const T* x = at<const T>(a.x, s.n, a.c0 + c, 0);
    double* bins = a.partial + s.first * a.channels + c;
    for (int64_t l = 0; l < s.ids; ++l) bins[l * a.channels] = 0;
    int64_t p = s.begin;
    for (int64_t r = 0; r < s.runs; ++r) {
      double total = 0;
      while (p < s.ends[r]) {
        const int64_t m = std::min<int64_t>(kChunk, s.ends[r] - p);
        const A* v = staged(x + p, m, buffer);
        A sum = 0;
        if (m < 16) {
          for (int64_t i = 0; i < m; ++i) sum += v[i];
        } else {
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < m; ++i) sum += v[i];
        }
        total += sum;
        p += m;
      }
      bins[s.labels[r] * a.channels] += total;
    }
  }
}

template <class T>
void sums_rows(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A buffer[kChunk], sum[kChunk];
  double* partial = a.partial + s.first * a.channels;
  std::fill(partial, partial + s.ids * a.channels, 0.0);
  for (int64_t c = begin; c < end; c += kChunk) {
    const int64_t width = std::min(kChunk, end - c);
    int64_t p = s.begin;
    for (int64_t r = 0; r < s.runs; ++r) {
      double* bins = partial + s.labels[r] * a.channels + c;
      while (p < s.ends[r]) {
        const int64_t stop = std::min<int64_t>(p + kRowPixels, s.ends[r]);
        std::fill(sum, sum + width, A(0));
        for (; p < stop; ++p) {
          const A* v = staged(at<const T>(a.x, s.n, a.c0 + c, p), width, buffer);
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) sum[j] += v[j];
        }
        for (int64_t j = 0; j < width; ++j) bins[j] += sum[j];
      }
    }
  }
}

// A buffer of output that is full, or ends the stripe.
template <class T> void flush(T* out, const T* buffer, int64_t n, bool stream) {
  if (stream) stream_bytes(out, buffer, n * int64_t(sizeof(T)));
  else std::memcpy(out, buffer, size_t(n) * sizeof(T));
}

template <class T>
void spread_planes(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  constexpr int64_t kLength = kBufferBytes / int64_t(sizeof(T)), kStep = kFillBytes / int64_t(sizeof(T));
  alignas(64) T buffer[kLength + kStep];
  for (int64_t c = begin; c < end; ++c) {
    T* out = at<T>(a.out, s.n, a.c0 + c, s.begin);
    int64_t p = s.begin, filled = 0;
    for (int64_t r = 0; r < s.runs; ++r) {
      const T mean = static_cast<const T*>(a.means)[s.rows[s.labels[r]] * a.channels + c];
      while (p < s.ends[r]) {
        const int64_t m = std::min<int64_t>(kLength - filled, s.ends[r] - p);
        // Whole vectors: what is written past the run, the next one overwrites.
        for (int64_t i = 0; i < m; i += kStep)
          for (int64_t j = 0; j < kStep; ++j) buffer[filled + i + j] = mean;
        filled += m;
        p += m;
        if (filled == kLength) {
          flush(out, buffer, filled, a.stream);
          out += filled;
          filled = 0;
        }
      }
    }
    flush(out, buffer, filled, a.stream);
  }
  if (a.stream) stream_fence();
}

template <class T>
void spread_rows(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  const int64_t width = end - begin, bytes = width * int64_t(sizeof(T));
  // Rows of a whole tensor follow each other: short ones are written several at a time.
  const bool dense = a.out.p == width;
  const int64_t together = dense ? std::max<int64_t>(kBufferBytes / bytes, 1) : 1;
  alignas(64) unsigned char buffer[kBufferBytes];
  int64_t p = s.begin;
  for (int64_t r = 0; r < s.runs; ++r) {
    const T* mean = static_cast<const T*>(a.means) + s.rows[s.labels[r]] * a.channels + begin;
    const int64_t length = s.ends[r] - p, several = std::min(together, length);
    const unsigned char* source = reinterpret_cast<const unsigned char*>(mean);
    if (several > 1) {
      for (int64_t q = 0; q < several; ++q) std::memcpy(buffer + q * bytes, mean, size_t(bytes));
      source = buffer;
    }
    while (p < s.ends[r]) {
      const int64_t m = std::min<int64_t>(several, s.ends[r] - p);
      flush(reinterpret_cast<unsigned char*>(at<T>(a.out, s.n, a.c0 + begin, p)), source, m * bytes,
            a.stream);
      p += m;
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace

void instance_runs_kernel(Ids type, const void* ids, int64_t begin, int64_t end, int32_t* ends,
                          int64_t* count) {
  with_ids(type, [&](auto tag) {
    const auto* p = static_cast<const decltype(tag)*>(ids);
    if (ends == nullptr) *count = count_runs(p, begin, end);
    else find_runs(p, begin, end, ends);
  });
}

#define SMIS_BY_ELEMENT(name, call)                                                              \
  void name(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {            \
    with_element(a.element, [&](auto tag) { call<decltype(tag)>(a, s, begin, end); });           \
  }
SMIS_BY_ELEMENT(instance_sums_planes, sums_planes)
SMIS_BY_ELEMENT(instance_sums_rows, sums_rows)
SMIS_BY_ELEMENT(instance_spread_planes, spread_planes)
SMIS_BY_ELEMENT(instance_spread_rows, spread_rows)

}  // namespace smis::SMIS_ISA
