// Numbering on CUDA, as cpu.cpp defines it. Threads race to insert keys into a hash table, but ids
// follow the first pixel of each key, so they do not depend on who wins.
#include "common/cuda.h"
#include "label_windows/check.h"

namespace smis::cuda {
namespace {

using u64 = unsigned long long;  // what CUDA's 64-bit atomics take

constexpr int64_t kTile = 4 * kThreads;  // pixels that one block numbers

// A key and an id in any order, or (ordered) pixels - its first pixel: a maximum, so that cleared
// memory is none. In the end the key makes room for the id in order.
struct Slot {
  u64 key, value;
};

struct Table {
  Slot* slots;
  u64* count;  // keys inserted: no more than `limit`, but for those that were under way
  u64 mask, limit;
};

// The slot of a key, -1 beyond the limit.
template <bool ordered> __device__ int32_t insert(const Table& t, u64 key, u64 rest) {
  u64 i = (key * kHashFactor) >> 32 & t.mask;  // high bits depend on all of the key's
  for (u64 probe = 0; probe <= t.mask; ++probe, i = (i + 1) & t.mask) {
    Slot& slot = t.slots[i];
    u64 held = now(slot.key);
    if (held != key && now(*t.count) > t.limit) return -1;
    if (held == 0) {
      held = atomicCAS(&slot.key, 0ull, key);
      if (held == 0) {
        const u64 id = atomicAdd(t.count, 1ull) + 1;
        if (!ordered) slot.value = id;
        held = key;
      }
    }
    if (held != key) continue;
    if (ordered && now(slot.value) < rest) atomicMax(&slot.value, rest);
    return int32_t(i);
  }
  return -1;
}

// Runs of one key inside a warp are inserted once, by their first lane.
template <bool ordered, class Key>
__global__ void insert_kernel(Table t, Key key_at, int64_t pixels, int32_t* slots) {
  const int lane = threadIdx.x & kLane;
  for (int64_t start = thread_index() - lane; start < pixels; start += thread_stride()) {
    const int64_t i = start + lane;
    const u64 key = i < pixels ? key_at(i) : 0;
    const u64 left = __shfl_up_sync(kWarp, key, 1);
    const bool leads = lane == 0 || key != left;
    int32_t slot = leads && i < pixels ? insert<ordered>(t, key, u64(pixels - i)) : -1;
    const unsigned leaders = __ballot_sync(kWarp, leads) & (kWarp >> (kLane - lane));
    slot = __shfl_sync(kWarp, slot, kLane - __clz(int(leaders)));
    if (i < pixels) slots[i] = slot;
  }
}

__device__ bool is_first(const Table& t, const int32_t* slots, int64_t pixels, int64_t i) {
  return i < pixels && slots[i] >= 0 && t.slots[slots[i]].value == u64(pixels - i);
}

// Firsts of each tile, a block a tile.
__global__ void count_kernel(Table t, const int32_t* slots, int64_t pixels, int32_t* counts) {
  int32_t count = 0;
  for (int64_t j = threadIdx.x; j < kTile; j += kThreads)
    count += __syncthreads_count(is_first(t, slots, pixels, blockIdx.x * kTile + j));
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// The sum of `value` over the threads before this one; `sum` is that of the block.
__device__ int32_t prefix(int32_t value, int32_t& sum) {
  __shared__ int32_t warps[kThreads / 32];
  const int lane = threadIdx.x & kLane, warp = threadIdx.x / 32;
  int32_t through = value;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kWarp, through, step);
    if (lane >= step) through += other;
  }
  if (lane == kLane) warps[warp] = through;
  __syncthreads();
  int32_t before = 0;
  sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    sum += warps[w];
  }
  __syncthreads();
  return before + through - value;
}

// counts -> sums of the counts before, by one block.
__global__ void prefix_kernel(int32_t* counts, int64_t tiles) {
  int32_t base = 0, sum = 0;
  for (int64_t start = 0; start < tiles; start += kThreads, base += sum) {
    const int64_t i = start + threadIdx.x;
    const int32_t before = prefix(i < tiles ? counts[i] : 0, sum);
    if (i < tiles) counts[i] = base + before;
  }
}

// Ids from 1 in order of first pixels; firsts[id] is where it was.
__global__ void number_kernel(Table t, const int32_t* slots, int64_t pixels, const int32_t* before,
                              int32_t* firsts) {
  int32_t base = before[blockIdx.x], sum = 0;
  for (int64_t j = threadIdx.x; j < kTile; j += kThreads, base += sum) {
    const int64_t i = blockIdx.x * kTile + j;
    const bool first = is_first(t, slots, pixels, i);
    const int32_t id = base + prefix(first, sum) + 1;
    if (!first) continue;
    t.slots[slots[i]].key = u64(id);
    if (u64(id) <= t.limit) firsts[id] = int32_t(i);
  }
}

// Slots -> ids, in place; `check` compares a pixel with the first of its key.
template <class Check>
__global__ void finish_kernel(Table t, Check check, int64_t pixels, int32_t* slots) {
  for (int64_t i = thread_index(); i < pixels; i += thread_stride()) {
    if (slots[i] < 0) continue;
    const Slot slot = t.slots[slots[i]];
    check(i, pixels - int64_t(slot.value));
    slots[i] = int32_t(slot.key);
  }
}

// (N, H, W) ids, row by row: the key of (left, self, right).
struct RowKey {
  const int32_t* map;
  int32_t width;
  u64 *refused, *unknown;
  __device__ u64 operator()(int64_t i) const {
    const int32_t x = int32_t(i) % width;
    if (map[i] > kMaxIds) *refused = 1;
    if (map[i] < 1) *unknown = u64(1 - int64_t(map[i]));  // 0 is none
    return triple(x > 0 ? map[i - 1] : 0, map[i], x + 1 < width ? map[i + 1] : 0);
  }
};

// The key of three rows' ids, which the table of the rows holds in any order.
struct WindowKey {
  const Slot* rows;
  const int32_t* slots;
  int32_t height, width;
  __device__ int32_t id(int64_t i) const {
    return slots[i] < 0 ? 0 : int32_t(rows[slots[i]].value);
  }
  __device__ u64 operator()(int64_t i) const {
    const int32_t y = int32_t(i) / width % height;
    return triple(y > 0 ? id(i - width) : 0, id(i), y + 1 < height ? id(i + width) : 0);
  }
};

struct Exact {
  __device__ void operator()(int64_t, int64_t) const {}
};

template <class T> struct Pixels {
  const T* data;
  int32_t height, width;
  int64_t channels, stride_n, stride_k, stride_h, stride_w;
  __device__ const T* at(int64_t i) const {
    const int32_t line = int32_t(i) / width, x = int32_t(i) - line * width;
    return data + line / height * stride_n + line % height * stride_h + x * stride_w;
  }
};

__device__ u64 bits_of(float v) { return __float_as_uint(v == 0 ? 0.f : v); }  // -0 equals 0
__device__ u64 bits_of(double v) { return u64(__double_as_longlong(v == 0 ? 0. : v)); }

template <class T> struct VectorKey {
  Pixels<T> x;
  u64* refused;
  __device__ u64 operator()(int64_t i) const {
    const T* vector = x.at(i);
    u64 key = kHashSeed;
    bool nan = false;
#pragma unroll 8
    for (int64_t k = 0; k < x.channels; ++k) {
      const Acc<T> v = load(vector[k * x.stride_k]);
      nan |= v != v;
      key = mix(key, bits_of(v));
    }
    if (nan) *refused = 1;
    return key | 1;  // 0 marks an empty slot
  }
};

// Two vectors with one hash are refused.
template <class T> struct SameVector {
  Pixels<T> x;
  u64* refused;
  __device__ void operator()(int64_t i, int64_t first) const {
    if (i == first) return;
    const T *a = x.at(i), *b = x.at(first);
    bool differs = false;
#pragma unroll 8
    for (int64_t k = 0; k < x.channels; ++k)
      differs |= !(load(a[k * x.stride_k]) == load(b[k * x.stride_k]));
    if (differs) *refused = 1;
  }
};

__global__ void windows_kernel(const int32_t* map, int32_t height, int32_t width,
                               const int32_t* firsts, int64_t count, int32_t* out) {
  for (int64_t e = thread_index(); e < (count + 1) * 9; e += thread_stride()) {
    const int64_t v = e / 9, tap = e % 9;
    int32_t id = 0;
    if (v > 0) {
      const int32_t i = firsts[v], dy = int32_t(tap / 3) - 1, dx = int32_t(tap % 3) - 1;
      const int32_t y = i / width % height + dy, x = i % width + dx;
      if (y >= 0 && y < height && x >= 0 && x < width) id = map[i + int64_t(dy) * width + dx];
    }
    out[e] = id;
  }
}

template <class T>
__global__ void vectors_kernel(Pixels<T> x, const int32_t* firsts, int64_t count, T* out) {
  for (int64_t e = thread_index(); e < (count + 1) * x.channels; e += thread_stride()) {
    const int64_t s = e / x.channels, k = e % x.channels;
    const Acc<T> v = s > 0 ? load(x.at(firsts[s])[k * x.stride_k]) : Acc<T>(0);
    out[e] = rounded<T>(v == 0 ? Acc<T>(0) : v);
  }
}

// What the host reads, once: keys of rows, keys, whether the input is refused, and 1
// - an id below 1.
struct Found {
  u64 rows, keys, refused, unknown;
};
constexpr int64_t kCounters = sizeof(Found) / sizeof(u64);

// One call: its pixels, its counters and the kernels queued on its stream.
class Numbering {
 public:
  Numbering(const Tensor& input, int64_t pixels, int64_t limit, const char* op)
      : pixels_(pixels), limit_(std::min(limit, pixels)), launch_(input, op), like_(input),
        found_(empty_of(input, {kCounters}, ScalarType::Long)) {
    if (pixels > int64_t(1) << 30)
      refuse(op, ": expected at most 2^30 pixels, got ", pixels, "; take fewer images at a time");
    firsts_ = empty_of(input, {std::max<int64_t>(limit_, 0) + 1}, ScalarType::Int);
    clear(found_, sizeof(Found));
  }
  Found* found() { return static_cast<Found*>(found_.mutable_data_ptr()); }
  const int32_t* firsts() const { return firsts_.const_data_ptr<int32_t>(); }
  cudaStream_t stream() const { return launch_.stream; }
  void check() const { launch_.check(); }

  template <bool ordered, class Key>
  Table insert(const Key& key, u64* count, int64_t limit, int32_t* slots) {
    int64_t capacity = 64;
    while (capacity < 2 * std::min(limit, pixels_)) capacity *= 2;
    kept_.push_back(empty_of(like_, {2 * capacity}, ScalarType::Long));
    clear(kept_.back(), size_t(capacity) * sizeof(Slot));
    const Table t{static_cast<Slot*>(kept_.back().mutable_data_ptr()), count, u64(capacity - 1),
                  u64(std::max<int64_t>(limit, 0))};
    insert_kernel<ordered><<<grid(pixels_), kThreads, 0, stream()>>>(t, key, pixels_, slots);
    launch_.check();
    return t;
  }
  template <class Check> void number(const Table& t, const Check& check, int32_t* slots) {
    const int64_t tiles = std::max<int64_t>(ceil_div(pixels_, kTile), 1);
    const Tensor held = empty_of(like_, {tiles}, ScalarType::Int);
    auto* counts = static_cast<int32_t*>(held.mutable_data_ptr());
    count_kernel<<<unsigned(tiles), kThreads, 0, stream()>>>(t, slots, pixels_, counts);
    launch_.check();
    prefix_kernel<<<1, kThreads, 0, stream()>>>(counts, tiles);
    launch_.check();
    number_kernel<<<unsigned(tiles), kThreads, 0, stream()>>>(
        t, slots, pixels_, counts, static_cast<int32_t*>(firsts_.mutable_data_ptr()));
    launch_.check();
    finish_kernel<<<grid(pixels_), kThreads, 0, stream()>>>(t, check, pixels_, slots);
    launch_.check();
  }
  // The size of the result depends on the data: the one time a call waits for the device, after
  // all that does not need it. Layouts are compiled outside CUDA graphs. -1: no numbering.
  int64_t count() {
    Found host{};
    launch_.fetch(&host, found());
    check_window_id(1 - int64_t(host.unknown));
    const bool fits = host.rows < u64(kMaxIds) && int64_t(host.keys) <= limit_;
    return fits && host.refused == 0 ? int64_t(host.keys) : -1;
  }
  int64_t limit() const { return limit_; }

 private:
  void clear(const Tensor& t, size_t bytes) {
    launch_.clear(t.mutable_data_ptr(), int64_t(bytes));
  }
  int64_t pixels_, limit_;
  Launch launch_;
  Tensor like_, found_, firsts_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> number_windows(const Tensor& map, int64_t limit) {
  const int64_t N = map.size(0), H = map.size(1), W = map.size(2), pixels = N * H * W;
  Numbering numbering(map, pixels, std::min(limit, kMaxIds), "number_windows");
  const Tensor dense = torch::stable::contiguous(map);
  const int32_t* in = dense.const_data_ptr<int32_t>();
  Tensor index = empty_of(map, {N, H, W}, ScalarType::Int);
  const Tensor rows = empty_of(map, {pixels}, ScalarType::Int);
  auto* slots = static_cast<int32_t*>(index.mutable_data_ptr());
  auto* row_slots = static_cast<int32_t*>(rows.mutable_data_ptr());
  Found* found = numbering.found();
  const int32_t height = int32_t(H), width = int32_t(W);

  const RowKey row_key{in, width, &found->refused, &found->unknown};
  const Table row_table = numbering.insert<false>(row_key, &found->rows, kMaxIds, row_slots);
  const WindowKey key{row_table.slots, row_slots, height, width};
  const Table table = numbering.insert<true>(key, &found->keys, numbering.limit(), slots);
  numbering.number(table, Exact{}, slots);
  const int64_t count = numbering.count();
  Tensor windows =
      empty_of(map, {count + 1, 9}, ScalarType::Int);
  if (count < 0) {
    torch::stable::zero_(index);
    return {index, windows};
  }
  windows_kernel<<<grid((count + 1) * 9), kThreads, 0, numbering.stream()>>>(
      in, height, width, numbering.firsts(), count,
      static_cast<int32_t*>(windows.mutable_data_ptr()));
  numbering.check();
  return {index, windows};
}

template <class T>
Tensor number_pixels(const Tensor& input, Numbering& numbering, int32_t* slots) {
  const int64_t K = input.size(1);
  const Pixels<T> x{static_cast<const T*>(input.const_data_ptr()), int32_t(input.size(2)),
                    int32_t(input.size(3)), K, input.stride(0), input.stride(1), input.stride(2),
                    input.stride(3)};
  Found* found = numbering.found();
  const Table table = numbering.insert<true>(VectorKey<T>{x, &found->refused}, &found->keys,
                                             numbering.limit(), slots);
  numbering.number(table, SameVector<T>{x, &found->refused}, slots);
  const int64_t count = numbering.count();
  Tensor vectors =
      torch::stable::empty({count + 1, K}, input.scalar_type(), std::nullopt, input.device());
  if (count < 0) return vectors;
  vectors_kernel<T><<<grid((count + 1) * K), kThreads, 0, numbering.stream()>>>(
      x, numbering.firsts(), count, static_cast<T*>(vectors.mutable_data_ptr()));
  numbering.check();
  return vectors;
}

std::tuple<Tensor, Tensor> number_vectors(const Tensor& input, int64_t limit) {
  const int64_t N = input.size(0), H = input.size(2), W = input.size(3);
  Numbering numbering(input, N * H * W, limit, "number_vectors");
  Tensor symbols = empty_of(input, {N, H, W}, ScalarType::Int);
  auto* slots = static_cast<int32_t*>(symbols.mutable_data_ptr());
  std::optional<Tensor> vectors;
  with_element(element_of(input, "number_vectors"), [&](auto t) {
    vectors = number_pixels<decltype(t)>(input, numbering, slots);
  });
  if (vectors->size(0) == 0) torch::stable::zero_(symbols);
  return {symbols, *vectors};
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("number_vectors", TORCH_BOX(&number_vectors));
  m.impl("number_windows", TORCH_BOX(&number_windows));
}

}  // namespace
}  // namespace smis::cuda
