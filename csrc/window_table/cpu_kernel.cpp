// Tables of gamma and beta over distinct windows. Two-level: T_t = H W_t for one block of channels
// at a time, so that T stays in cache, then nine of its rows are summed for each window. One-level:
// the nine rows of H meet their weights directly, without T.
#include "window_table/cpu_kernel.h"

#include <algorithm>

#include "common/lanes.h"
#include "common/transposed.h"

namespace smis::SMIS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kOneLevelRows = 6;
#else
constexpr int kOneLevelRows = 2;
#endif
constexpr int kTaps = 3;  // taps of a two-level tile: rows x taps sums fill the registers
constexpr int kWide = 4;  // vectors of a one-level block
// Vectors of a two-level block: rows of a table lie far apart, and are written by whole cache lines.
constexpr int kLine = 64 / kVectorBytes;

// One block: which half, group and channels; `lanes` of them exist.
struct Block {
  int64_t half, group, channel, lanes;
};
Block block_at(const WindowTableArgs& a, int64_t i, int64_t width) {
  const int64_t per_group = a.C / a.groups, each = (per_group + width - 1) / width;
  const int64_t half = i / (each * a.groups), j = i % (each * a.groups);
  const int64_t first = j % each * width;
  return {half, j / each, j / each * per_group + first, std::min(width, per_group - first)};
}

// The windows of a block's group by its rows of hidden, and how many of those there are.
struct Rows {
  const int32_t* windows;
  int64_t V;
};

template <class T>
void two_level(const WindowTableArgs& a, const Block& b, const Rows& rows, T* packed, T* t) {
  constexpr int64_t L = Lanes<T>::n;
  const int64_t depth = a.D / a.groups, J = depth * 9, plane = a.V * 9 * L;
  const int64_t vectors = (b.lanes + L - 1) / L;
  const T* hidden = static_cast<const T*>(a.hidden) + b.group * depth;
  alignas(kVectorBytes) T bias[kLine * L], line[L];
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t lanes = std::min(L, b.lanes - j * L), channel = b.channel + j * L;
    const T* weight = static_cast<const T*>(a.weight[b.half]) + channel * J;
    transposed(weight, J, lanes, J, [&](int64_t i) {  // (channel, k, tap) -> (taps, k, tap, channel)
      const int64_t k = i / 9, tap = i % 9;
      return packed + ((tap / kTaps * depth + k) * kTaps + tap % kTaps) * L;
    });
    const T* right = packed;
    for (int first = 0; first < 9; first += kTaps, right += depth * kTaps * L) {
      // t[v][tap] = sum over k of hidden[v][k] * packed[k][tap] for kTaps of the nine taps
      T* to = t + j * plane + first * L;
      int64_t v = 0;
      for (; v + kTileRows <= rows.V; v += kTileRows)
        product_tile<T, kTaps, false>(hidden + v * a.D, a.D, 1, right, kTaps * L, depth,
                                      to + v * 9 * L, 9 * L);
      for (; v < rows.V; ++v)
        product_tile<T, kTaps, false, 1>(hidden + v * a.D, a.D, 1, right, kTaps * L, depth,
                                         to + v * 9 * L, 9 * L);
    }
    for (int64_t l = 0; l < L; ++l)
      bias[j * L + l] = l < lanes ? static_cast<const T*>(a.bias[b.half])[channel + l] : T(0);
  }
  T* out = static_cast<T*>(a.table) + b.half * a.C + b.channel;
  std::fill(out, out + b.lanes, T(0));
  for (int64_t u = 1; u < a.U; ++u) {
    const int32_t* w = rows.windows + u * 9;
    for (int64_t j = 0; j < vectors; ++j) {
      Vec<T> sum = get(bias + j * L);
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) sum += get(t + j * plane + (int64_t(w[tap]) * 9 + tap) * L);
      T* o = out + u * 2 * a.C + j * L;
      if (b.lanes - j * L >= L) {
        put(o, sum);
      } else {
        put(line, sum);
        std::copy(line, line + b.lanes - j * L, o);
      }
    }
  }
}

template <class T, int rows>
inline void direct_tile(const WindowTableArgs& a, const int32_t* windows, int64_t u, int64_t offset,
                        int64_t depth, const T* packed, const T* bias, T* result) {
  constexpr int64_t L = Lanes<T>::n;
  Vec<T> sum[rows][kWide];
#pragma GCC unroll 24
  for (int i = 0; i < rows * kWide; ++i) sum[i / kWide][i % kWide] = get(bias + i % kWide * L);
  for (int tap = 0; tap < 9; ++tap) {
    const T* h[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
      h[r] = static_cast<const T*>(a.hidden) + windows[(u + r) * 9 + tap] * a.D + offset;
    multiply_into<T>(sum, [&](int r, int64_t k) { return h[r][k]; },
                     packed + tap * depth * kWide * L, kWide * L, depth);
  }
#pragma GCC unroll 24
  for (int i = 0; i < rows * kWide; ++i) put(result + i * L, sum[i / kWide][i % kWide]);
}

template <class T>
void one_level(const WindowTableArgs& a, const Block& b, const Rows& group, T* packed) {
  constexpr int64_t L = Lanes<T>::n, width = kWide * L;
  const int64_t depth = a.D / a.groups, J = depth * 9;
  const T* weight = static_cast<const T*>(a.weight[b.half]) + b.channel * J;
  for (int64_t v = 0; v < kWide; ++v) {  // (channel, k, tap) -> (tap, k, channel)
    const int64_t count = std::clamp<int64_t>(b.lanes - v * L, 0, L);
    transposed(weight + v * L * J, J, count, J, [&](int64_t i) {
      return packed + (i % 9 * depth + i / 9) * width + v * L;
    });
  }
  alignas(kVectorBytes) T bias[width], result[kOneLevelRows * width];
  for (int64_t l = 0; l < width; ++l)
    bias[l] = l < b.lanes ? static_cast<const T*>(a.bias[b.half])[b.channel + l] : T(0);
  T* out = static_cast<T*>(a.table) + b.half * a.C + b.channel;
  std::fill(out, out + b.lanes, T(0));
  for (int64_t u = 1; u < a.U;) {
    const int64_t rows = a.U - u >= kOneLevelRows ? kOneLevelRows : 1;
    if (rows == kOneLevelRows)
      direct_tile<T, kOneLevelRows>(a, group.windows, u, b.group * depth, depth, packed, bias, result);
    else
      direct_tile<T, 1>(a, group.windows, u, b.group * depth, depth, packed, bias, result);
    for (int64_t r = 0; r < rows; ++r, ++u)
      std::copy(result + r * width, result + r * width + b.lanes, out + u * 2 * a.C);
  }
}

template <class T> void plan(const WindowTableArgs& a, int64_t* blocks, int64_t* scratch_bytes) {
  constexpr int64_t L = Lanes<T>::n;
  const int64_t width = (a.one_level ? kWide : kLine) * L, per_group = a.C / a.groups;
  *blocks = 2 * a.groups * ((per_group + width - 1) / width);
  const int64_t packed = a.D / a.groups * 9 * width;
  *scratch_bytes = int64_t(sizeof(T)) * (packed + (a.one_level ? 0 : a.V * 9 * width)) +
                   (a.kinds == nullptr ? 0 : int64_t(sizeof(int32_t)) * a.U * 9);
}

template <class T>
void window_table(const WindowTableArgs& a, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t L = Lanes<T>::n;
  const int64_t width = (a.one_level ? kWide : kLine) * L;
  T *packed = static_cast<T*>(scratch), *t = packed + a.D / a.groups * 9 * width;
  int32_t* own = reinterpret_cast<int32_t*>(t + (a.one_level ? 0 : a.V * 9 * width));
  Rows rows{a.windows, a.V};
  int64_t known = -1;
  for (int64_t i = begin; i < end; ++i) {
    const Block b = block_at(a, i, width);
    if (a.kinds != nullptr && a.kinds[b.group] != known) {
      known = a.kinds[b.group];
      const int32_t* ids = a.ids + known * a.sources;
      int32_t most = 0;
      for (int64_t j = 0; j < a.U * 9; ++j) most = std::max(most, own[j] = ids[a.windows[j]]);
      rows = {own, int64_t(most) + 1};
    }
    if (a.one_level) one_level<T>(a, b, rows, packed);
    else two_level<T>(a, b, rows, packed, t);
  }
}

template <class T> void window_sum(const WindowSumArgs& a, int64_t begin, int64_t end) {
  const T *rows = static_cast<const T*>(a.rows), *bias = static_cast<const T*>(a.bias);
  const int64_t each = a.C / a.groups;
  for (int64_t v = begin; v < end; ++v)
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t kind = a.kinds == nullptr ? 0 : a.kinds[g], first = g * each;
      const int32_t* window = a.windows + (kind * a.V + v) * 9;
      const bool used = v > 0 && (a.counts == nullptr || v <= a.counts[kind]);
      T* __restrict out = static_cast<T*>(a.out) + v * a.C + first;
      if (!used || bias == nullptr) std::fill(out, out + each, T(0));
      else std::copy(bias + first, bias + first + each, out);
      if (!used) continue;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const T* __restrict row = rows + (int64_t(window[tap]) * 9 + tap) * a.C + first;
#pragma omp simd
        for (int64_t c = 0; c < each; ++c) out[c] += row[c];
      }
      if (a.relu) {
#pragma omp simd
        for (int64_t c = 0; c < each; ++c) out[c] = out[c] < T(0) ? T(0) : out[c];
      }
    }
}

// Each thread owns a range of channels: a fixed order of sums, no atomics.
template <class T> void window_scatter(const WindowScatterArgs& a, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(a.out);
  const int64_t each = a.C / a.groups;
  for (int64_t r = 0; r < a.R * 9; ++r) std::fill(out + r * a.C + begin, out + r * a.C + end, T(0));
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t group = first / each;
    last = std::min(end, (group + 1) * each);
    const int32_t* windows = a.windows + (a.kinds == nullptr ? 0 : a.kinds[group] * a.V * 9);
    for (int64_t v = 1; v < a.V; ++v) {
      const T* __restrict g = static_cast<const T*>(a.grad) + v * a.C;
      for (int64_t tap = 0; tap < 9; ++tap) {
        T* __restrict row = out + (int64_t(windows[v * 9 + tap]) * 9 + tap) * a.C;
#pragma omp simd
        for (int64_t c = first; c < last; ++c) row[c] += g[c];
      }
    }
  }
}

}  // namespace

void window_table_kernel(const WindowTableArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.wide ? window_table<double>(a, begin, end, scratch) : window_table<float>(a, begin, end, scratch);
}
void window_table_plan(const WindowTableArgs& a, int64_t* blocks, int64_t* scratch_bytes) {
  a.wide ? plan<double>(a, blocks, scratch_bytes) : plan<float>(a, blocks, scratch_bytes);
}
void window_sum_kernel(const WindowSumArgs& a, int64_t begin, int64_t end) {
  a.wide ? window_sum<double>(a, begin, end) : window_sum<float>(a, begin, end);
}
void window_scatter_kernel(const WindowScatterArgs& a, int64_t begin, int64_t end) {
  a.wide ? window_scatter<double>(a, begin, end) : window_scatter<float>(a, begin, end);
}

}  // namespace smis::SMIS_ISA
