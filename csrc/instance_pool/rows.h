// Dense channels: summed in registers, pixel by pixel.
#pragma once
#include "common/stream.h"
#include "instance_pool/pieces.h"

namespace smis::SMIS_ISA {
namespace {

constexpr int64_t kRowPixels = 64;  // pixels summed in the narrow type before a bin in fp64
constexpr int64_t kParts = 4;       // of a stripe read side by side: so memory is read fastest
constexpr int kVecs = kVectorBytes == 64 ? 4 : 2;

// Where a part of a stripe is read: a pixel, and its run.
struct Place {
  int64_t p = 0, run = 0;
};

// V vectors of channels from c on, for the next `pixels` of each part.
template <class T, int V, int64_t parts>
void add_rows(const InstancePoolArgs& a, const Stripe& s, int64_t c, const Place (&at_part)[parts],
              int64_t pixels, double* bins) {
  using A = Acc<T>;
  constexpr int64_t L = Lanes<A>::n;
  alignas(64) A buffer[V * L], out[V * L];
  const T* x[parts];
  for (int64_t k = 0; k < parts; ++k) x[k] = at<const T>(a.x, s.n, a.c0 + c, at_part[k].p);
  Vec<A> sum[parts][V] = {};
  for (int64_t q = 0; q < pixels; ++q)
#pragma GCC unroll 4
    for (int64_t k = 0; k < parts; ++k) {
      const A* v = staged(x[k] + q * a.x.p, V * L, buffer);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[k][i] += get(v + i * L);
    }
#pragma GCC unroll 4
  for (int64_t k = 0; k < parts; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) put(out + i * L, sum[k][i]);
    double* bin = bins + s.labels[at_part[k].run] * a.partial_row + c;
    for (int64_t j = 0; j < V * L; ++j) bin[j] += out[j];
  }
}

// Pixels [first, first + parts * length), each part up to the next end of a run in any of them.
template <class T, int64_t parts>
void sum_parts(const InstancePoolArgs& a, const Stripe& s, int64_t first, int64_t length,
               int64_t begin, int64_t end, double* bins) {
  using A = Acc<T>;
  constexpr int64_t L = Lanes<A>::n;
  Place at_part[parts];
  for (int64_t k = 0; k < parts; ++k) {
    const int64_t p = first + k * length;
    at_part[k] = {p, std::upper_bound(s.ends, s.ends + s.runs, p) - s.ends};
  }
  for (int64_t done = 0, pixels; done < length; done += pixels) {
    pixels = std::min(kRowPixels, length - done);
    for (const Place& k : at_part) pixels = std::min(pixels, s.ends[k.run] - k.p);
    int64_t c = begin;
    for (; c + kVecs * L <= end; c += kVecs * L)
      add_rows<T, kVecs>(a, s, c, at_part, pixels, bins);
    for (; c + L <= end; c += L) add_rows<T, 1>(a, s, c, at_part, pixels, bins);
    for (; c < end; ++c)
      for (const Place& k : at_part) {
        A sum = 0;
        for (int64_t q = 0; q < pixels; ++q) sum += load(*at<const T>(a.x, s.n, a.c0 + c, k.p + q));
        bins[s.labels[k.run] * a.partial_row + c] += sum;
      }
    for (Place& k : at_part) {
      k.p += pixels;
      k.run += k.p == s.ends[k.run];
    }
  }
}

template <class T>
void sums_rows(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  double* bins = a.partial + s.first * a.partial_row;
  for (int64_t l = 0; l < s.ids; ++l)
    std::fill(bins + l * a.partial_row + begin, bins + l * a.partial_row + end, 0.0);
  const int64_t pixels = s.end - s.begin, length = pixels / kParts;
  sum_parts<T, kParts>(a, s, s.begin, length, begin, end, bins);
  sum_parts<T, 1>(a, s, s.begin + kParts * length, pixels % kParts, begin, end, bins);
}

// `count` copies of one row.
inline void repeat(unsigned char* to, const void* row, int64_t bytes, int64_t count) {
  std::memcpy(to, row, size_t(bytes));
  for (int64_t done = 1; done < count;) {
    const int64_t more = std::min(done, count - done);
    std::memcpy(to + done * bytes, to, size_t(more * bytes));
    done += more;
  }
}

template <class T>
void spread_rows(const InstancePoolArgs& a, const Stripe& s, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = 4096, kLine = 64;
  const int64_t bytes = (end - begin) * int64_t(sizeof(T));
  // Rows of a whole tensor follow each other: those that end inside a line are written together.
  const bool gather = a.out.p == end - begin && bytes % kLine != 0;
  const int64_t together = gather ? std::max<int64_t>(kBytes / bytes, 1) : 1;
  alignas(64) unsigned char buffer[kBytes];
  const auto write = [&](int64_t p, const void* from, int64_t count) {
    auto* out = at<T>(a.out, s.n, a.c0 + begin, p);
    if (a.stream) stream_bytes(out, from, count);
    else std::memcpy(out, from, size_t(count));
  };
  const T* means = static_cast<const T*>(a.means) + s.image * a.mean_row + begin;
  int64_t held = 0, p = s.begin;  // rows in the buffer, and the pixel after them
  for (int64_t r = 0; r < s.runs; ++r) {
    const T* mean = means + s.rows[s.labels[r]] * a.mean_row;
    while (p < s.ends[r]) {
      if (together == 1) {
        write(p++, mean, bytes);
        continue;
      }
      const int64_t count = std::min<int64_t>(s.ends[r] - p, together - held);
      repeat(buffer + held * bytes, mean, bytes, count);
      held += count;
      p += count;
      if (held < together) break;
      write(p - held, buffer, held * bytes);
      held = 0;
    }
  }
  if (held > 0) write(p - held, buffer, held * bytes);
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace smis::SMIS_ISA
