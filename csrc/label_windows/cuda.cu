// Numbering on CUDA, as cpu.cpp defines it. Threads race to insert keys into a hash table, but ids
// follow the first pixel of each key, so they do not depend on who wins.
#include <cstdint>
#include <limits>
#include <optional>

#include "common/cuda.h"
#include "common/nearest.h"
#include "label_windows/check.h"

namespace smis::cuda {
namespace {

using u64 = unsigned long long;  // what CUDA's 64-bit atomics take

// A key and an id in any order, or (ordered) pixels - its first pixel: a maximum, so that cleared
// memory is none. In the end the key makes room for the id in order.
struct Slot {
  u64 key, value;
};

// What numbering one level counts and meets; cleared memory is its start.
struct State {
  u64 rows, keys;  // distinct ones: no more than the limit, but for those that were under way
  u64 refused;     // 1: an id that does not fit a key, or a vector that is not to be numbered
  u64 unknown;     // 1 - the least id below 1
};

struct Table {
  Slot* slots;
  u64* count;
  u64 mask, limit;
};

// A map that is numbered on its own: pixels (N, height, width) that begin at `first` in memory
// which all levels share, in blocks of the grid that begin at `tile`, a thread a pixel.
struct Level {
  int64_t first = 0, pixels = 0, tile = 0;
  int32_t height = 0, width = 0;
  int64_t row = 0;  // where its windows begin
  Table table{};
  State* state = nullptr;
  const Slot* rows = nullptr;       // the table of its rows
  const int64_t* before = nullptr;  // where the numbering that it follows on has its count
  int64_t* count = nullptr;         // distinct keys, -1 where it is refused

  // Not before all keys are inserted.
  __device__ bool refused() const {
    return state->keys > table.limit || state->rows >= u64(kMaxIds) || state->refused != 0 ||
           state->unknown != 0 || (before != nullptr && *before < 0);
  }
};

constexpr int kMaxLevels = 16;
struct Levels {
  Level at[kMaxLevels];
  int count = 0;
  int64_t tiles = 0;
};

__device__ int level_of(const Levels& levels, int64_t tile) {
  int l = 0;
  while (l + 1 < levels.count && tile >= levels.at[l + 1].tile) ++l;
  return l;
}
__device__ int64_t pixel_of(const Level& level) {
  return (int64_t(blockIdx.x) - level.tile) * kThreads + threadIdx.x;
}

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
__global__ void insert_kernel(const __grid_constant__ Levels levels, Key key_at, int32_t* slots) {
  const Level& level = levels.at[level_of(levels, blockIdx.x)];
  const int lane = threadIdx.x & kLane;
  const int64_t i = pixel_of(level);
  const bool inside = i < level.pixels;
  const u64 key = inside ? key_at(level, i) : 0;
  const u64 left = __shfl_up_sync(kWarp, key, 1);
  const bool leads = lane == 0 || key != left;
  int32_t slot = leads && inside ? insert<ordered>(level.table, key, u64(level.pixels - i)) : -1;
  const unsigned leaders = __ballot_sync(kWarp, leads) & (kWarp >> (kLane - lane));
  slot = __shfl_sync(kWarp, slot, kLane - __clz(int(leaders)));
  if (inside) slots[level.first + i] = slot;
}

__device__ bool is_first(const Level& level, const int32_t* slots, int64_t i) {
  if (i >= level.pixels) return false;
  const int32_t slot = slots[level.first + i];
  return slot >= 0 && level.table.slots[slot].value == u64(level.pixels - i);
}

// Firsts of each tile.
__global__ void count_kernel(const __grid_constant__ Levels levels, const int32_t* slots,
                             int32_t* counts) {
  const Level& level = levels.at[level_of(levels, blockIdx.x)];
  const int count = __syncthreads_count(is_first(level, slots, pixel_of(level)));
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

// counts -> sums of the counts before in the same level, a block a level.
__global__ void prefix_kernel(const __grid_constant__ Levels levels, int32_t* counts) {
  const Level& level = levels.at[blockIdx.x];
  const int64_t tiles = (level.pixels + kThreads - 1) / kThreads;
  int32_t base = 0, sum = 0;
  for (int64_t start = 0; start < tiles; start += kThreads, base += sum) {
    const int64_t i = start + threadIdx.x;
    int32_t* count = counts + level.tile + i;
    const int32_t before = prefix(i < tiles ? *count : 0, sum);
    if (i < tiles) *count = base + before;
  }
  if (threadIdx.x == 0 && level.count != nullptr)
    *level.count = level.refused() ? -1 : int64_t(level.state->keys);
}

// Ids from 1 in order of first pixels; `put` is told what was first.
template <class Put>
__global__ void number_kernel(const __grid_constant__ Levels levels, const int32_t* slots,
                              const int32_t* before, Put put) {
  const Level& level = levels.at[level_of(levels, blockIdx.x)];
  const int64_t i = pixel_of(level);
  const bool first = is_first(level, slots, i);
  int32_t sum = 0;
  const int32_t id = before[blockIdx.x] + prefix(first, sum) + 1;
  if (!first) return;
  level.table.slots[slots[level.first + i]].key = u64(id);
  if (u64(id) <= level.table.limit) put(level, id, int32_t(i));
}

// Slots -> ids, in place; `check` compares a pixel with the first of its key, and tells whether the
// level is refused.
template <class Check>
__global__ void finish_kernel(const __grid_constant__ Levels levels, Check check, int32_t* slots) {
  const Level& level = levels.at[level_of(levels, blockIdx.x)];
  const int64_t i = pixel_of(level);
  if (i >= level.pixels) return;
  int32_t& own = slots[level.first + i];
  if (own < 0) {
    own = 0;
    return;
  }
  const Slot slot = level.table.slots[own];
  own = check(level, i, level.pixels - int64_t(slot.value)) ? 0 : int32_t(slot.key);
}

// Three ids of a row side by side.
__device__ u64 row_key(const Level& level, int32_t left, int32_t self, int32_t right) {
  State& state = *level.state;
  if (self > kMaxIds) state.refused = 1;
  const u64 low = self < 1 ? u64(1 - int64_t(self)) : 0;
  if (now(state.unknown) < low) atomicMax(&state.unknown, low);
  return triple(left, self, right);
}

// Of maps (N, height, width) of ids.
struct RowKey {
  const int32_t* maps;
  __device__ u64 operator()(const Level& level, int64_t i) const {
    const int32_t* map = maps + level.first;
    const int32_t x = int32_t(i) % level.width;
    return row_key(level, x > 0 ? map[i - 1] : 0, map[i],
                   x + 1 < level.width ? map[i + 1] : 0);
  }
};

// Of one (N, height, width) map, resized to each level by nearest and written down.
struct ResizedRowKey {
  const int32_t* map;
  int32_t height, width;
  int32_t* maps;
  __device__ u64 operator()(const Level& level, int64_t i) const {
    const int32_t line = int32_t(i) / level.width, x = int32_t(i) - line * level.width;
    const int32_t n = line / level.height, y = line - n * level.height;
    const Nearest down(height, level.height), across(width, level.width);
    const int32_t* row = map + (int64_t(n) * height + down.source(y)) * width;
    const int32_t self = row[across.source(x)];
    maps[level.first + i] = self;
    return row_key(level, x > 0 ? row[across.source(x - 1)] : 0, self,
                   x + 1 < level.width ? row[across.source(x + 1)] : 0);
  }
};

// The key of three rows' ids, which the table of the rows holds in any order.
struct WindowKey {
  const int32_t* row_slots;
  __device__ int32_t id(const Level& level, int64_t i) const {
    const int32_t slot = row_slots[level.first + i];
    return slot < 0 ? 0 : int32_t(level.rows[slot].value);
  }
  __device__ u64 operator()(const Level& level, int64_t i) const {
    const int32_t y = int32_t(i) / level.width % level.height;
    return triple(y > 0 ? id(level, i - level.width) : 0, id(level, i),
                  y + 1 < level.height ? id(level, i + level.width) : 0);
  }
};

// The nine ids of a window, at its first pixel.
struct PutWindow {
  const int32_t* maps;
  int32_t* windows;
  __device__ void operator()(const Level& level, int32_t id, int32_t i) const {
    const int32_t* map = maps + level.first;
    const int32_t x = i % level.width, y = i / level.width % level.height;
    int32_t* out = windows + (level.row + id) * 9;
    for (int tap = 0; tap < 9; ++tap) {
      const int32_t dy = tap / 3 - 1, dx = tap % 3 - 1;
      const bool inside = y + dy >= 0 && y + dy < level.height && x + dx >= 0 &&
                          x + dx < level.width;
      out[tap] = inside ? map[i + int64_t(dy) * level.width + dx] : 0;
    }
  }
};

struct PutFirst {
  int32_t* firsts;
  __device__ void operator()(const Level&, int32_t id, int32_t i) const { firsts[id] = i; }
};

struct Exact {
  __device__ bool operator()(const Level& level, int64_t, int64_t) const {
    return level.refused();
  }
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
  __device__ u64 operator()(const Level& level, int64_t i) const {
    const T* vector = x.at(i);
    u64 key = kHashSeed;
    bool nan = false;
#pragma unroll 8
    for (int64_t k = 0; k < x.channels; ++k) {
      const Acc<T> v = load(vector[k * x.stride_k]);
      nan |= v != v;
      key = mix(key, bits_of(v));
    }
    if (nan) level.state->refused = 1;
    return key | 1;  // 0 marks an empty slot
  }
};

// Two vectors with one hash are refused, by the host, which reads the state.
template <class T> struct SameVector {
  Pixels<T> x;
  __device__ bool operator()(const Level& level, int64_t i, int64_t first) const {
    if (i == first) return false;
    const T *a = x.at(i), *b = x.at(first);
    bool differs = false;
#pragma unroll 8
    for (int64_t k = 0; k < x.channels; ++k)
      differs |= !(load(a[k * x.stride_k]) == load(b[k * x.stride_k]));
    if (differs) level.state->refused = 1;
    return false;
  }
};

template <class T>
__global__ void vectors_kernel(Pixels<T> x, const int32_t* firsts, int64_t count, T* out) {
  for (int64_t e = thread_index(); e < (count + 1) * x.channels; e += thread_stride()) {
    const int64_t s = e / x.channels, k = e % x.channels;
    const Acc<T> v = s > 0 ? load(x.at(firsts[s])[k * x.stride_k]) : Acc<T>(0);
    out[e] = rounded<T>(v == 0 ? Acc<T>(0) : v);
  }
}

// What labels stand for: a class, or a pair of class and edge; -1 out of range.
template <class I> struct LabelKinds {
  const I* labels;
  const uint8_t* edges;  // or null
  int64_t classes, pixels;
  __device__ int32_t at(int64_t i) const {
    const int64_t label = int64_t(labels[i]);
    if (label < 0 || label >= classes) return -1;
    return int32_t(edges == nullptr ? label : 2 * label + (edges[i] != 0));
  }
};

// How many kinds there are, and how far labels lie below and above their range.
struct FoundLabels {
  u64 kinds, below, above;
};

template <class I>
__global__ void mark_kernel(LabelKinds<I> x, int32_t* present, FoundLabels* found) {
  for (int64_t i = thread_index(); i < x.pixels; i += thread_stride()) {
    const int32_t kind = x.at(i);
    if (kind >= 0) {
      if (now(present[kind]) == 0) atomicMax(&present[kind], 1);
      continue;
    }
    const int64_t label = int64_t(x.labels[i]);
    const bool below = label < 0;
    const u64 by = below ? u64(label == INT64_MIN ? INT64_MAX : -label)
                         : u64(label - x.classes + 1);
    atomicMax(below ? &found->below : &found->above, by);
  }
}

constexpr float kNoVector = std::numeric_limits<float>::quiet_NaN();

// Present kinds -> their ranks from 1, and a vector for each; by one block.
__global__ void rank_kernel(int32_t* kinds, int32_t count, int32_t channels, bool edges,
                            const FoundLabels* found, FoundLabels* out, float* vectors) {
  int32_t base = 0, sum = 0;
  for (int32_t start = 0; start < count; start += kThreads, base += sum) {
    const int32_t k = start + int32_t(threadIdx.x);
    const bool present = k < count && kinds[k] != 0;
    const int32_t rank = base + prefix(present, sum) + 1;
    if (!present) continue;
    kinds[k] = rank;
    float* row = vectors + int64_t(rank) * channels;
    row[edges ? k / 2 : k] = 1;
    if (edges && k % 2 == 1) row[channels - 1] = 1;
  }
  for (int32_t c = int32_t(threadIdx.x); c < channels; c += kThreads)
    vectors[(int64_t(count) + 1) * channels + c] = kNoVector;
  if (threadIdx.x == 0) *out = FoundLabels{u64(base), found->below, found->above};
}

template <class I>
__global__ void rank_pixels_kernel(LabelKinds<I> x, const int32_t* ranks, int32_t none,
                                   int32_t* symbols) {
  for (int64_t i = thread_index(); i < x.pixels; i += thread_stride()) {
    const int32_t kind = x.at(i);
    symbols[i] = kind < 0 ? none : ranks[kind];
  }
}

int64_t padded(int64_t count) { return ceil_div(count, 64) * 64; }  // keeps 256-byte alignment

// One call: its levels, its memory and the kernels queued on its stream.
class Numbering {
 public:
  Numbering(const Tensor& input, const char* op) : launch_(input, op), like_(input), op_(op) {}

  // The limit is cut to what there can be; `row` and `first` follow those before.
  Level& add(int64_t N, int64_t height, int64_t width, int64_t limit) {
    const int64_t pixels = N * height * width;
    if (pixels > int64_t(1) << 30)
      refuse(op_, ": expected at most 2^30 pixels, got ", pixels,
             "; take fewer images at a time");
    Level& level = levels_.at[levels_.count++];
    level.first = pixels_, level.pixels = pixels, level.tile = levels_.tiles, level.row = rows_;
    level.height = int32_t(height), level.width = int32_t(width);
    level.table.limit = u64(std::clamp(limit, int64_t(0), pixels));
    levels_.tiles += ceil_div(pixels, kThreads);
    pixels_ += padded(pixels), rows_ += padded(int64_t(level.table.limit) + 1);
    return level;
  }
  Level& operator[](int l) { return levels_.at[l]; }
  int count() const { return levels_.count; }
  int64_t pixels() const { return pixels_; }  // of all levels, and what aligns them
  int64_t rows() const { return rows_; }      // of their windows
  cudaStream_t stream() const { return launch_.stream; }
  void check(cudaError_t status = cudaGetLastError()) const { launch_.check(status); }
  int32_t* ints(int64_t count) { return static_cast<int32_t*>(keep(count, ScalarType::Int)); }
  void clear(const Tensor& t, int64_t bytes) const { launch_.clear(t.mutable_data_ptr(), bytes); }

  // Cleared tables of windows or vectors and, `rows`, of the rows that windows are made of.
  void make_tables(bool rows) {
    std::vector<int64_t> own, below;
    int64_t slots = 0;
    for (int l = 0; l < count(); ++l) {
      own.push_back(room(int64_t(levels_.at[l].table.limit), slots));
      if (rows) below.push_back(room(std::min(levels_.at[l].pixels, kMaxIds), slots));
    }
    const int64_t states = count() * int64_t(sizeof(State) / sizeof(u64));
    if (!memory_) memory_ = empty_of(like_, {2 * slots + states}, ScalarType::Long);
    clear(*memory_, (2 * slots + states) * int64_t(sizeof(u64)));
    Slot* at = static_cast<Slot*>(memory_->mutable_data_ptr());
    states_ = reinterpret_cast<State*>(at + slots);
    for (int l = 0; l < count(); ++l) {
      Level& level = levels_.at[l];
      level.state = states_ + l;
      level.table.slots = at, level.table.mask = u64(own[size_t(l)] - 1);
      level.table.count = &level.state->keys;
      at += own[size_t(l)];
      if (!rows) continue;
      level.rows = at;
      below_[l] = Table{at, &level.state->rows, u64(below[size_t(l)] - 1), u64(kMaxIds)};
      at += below[size_t(l)];
    }
  }
  // `slots` become ids.
  template <class Key, class Put, class Check>
  void number(const Key& key, const Put& put, const Check& check, int32_t* slots) {
    insert<true>(levels_, key, slots);
    int32_t* counts = ints(tiles());
    count_kernel<<<unsigned(tiles()), kThreads, 0, stream()>>>(levels_, slots, counts);
    launch_.check();
    prefix_kernel<<<unsigned(count()), kThreads, 0, stream()>>>(levels_, counts);
    launch_.check();
    number_kernel<<<unsigned(tiles()), kThreads, 0, stream()>>>(levels_, slots, counts, put);
    launch_.check();
    finish_kernel<<<unsigned(tiles()), kThreads, 0, stream()>>>(levels_, check, slots);
    launch_.check();
  }
  // Windows of `maps`, which `key` reads or writes row by row.
  template <class Key>
  void number_windows(const Key& key, const int32_t* maps, int32_t* slots, int32_t* windows) {
    make_tables(true);
    Levels rows = levels_;
    for (int l = 0; l < count(); ++l) rows.at[l].table = below_[l];
    if (row_slots_ == nullptr) row_slots_ = ints(pixels_);
    insert<false>(rows, key, row_slots_);
    number(WindowKey{row_slots_}, PutWindow{maps, windows}, Exact{}, slots);
  }
  // The size of the result depends on the data: the one time a call waits for the device, after
  // all that does not need it. -1: no numbering.
  int64_t wait() {
    State state{};
    launch_.fetch(&state, states_);
    check_window_id(1 - int64_t(state.unknown));
    const bool fits = state.rows < u64(kMaxIds) && state.keys <= levels_.at[0].table.limit;
    return fits && state.refused == 0 ? int64_t(state.keys) : -1;
  }

 private:
  static int64_t room(int64_t keys, int64_t& sum) {
    int64_t capacity = 64;
    while (capacity < 2 * keys) capacity *= 2;
    sum += capacity;
    return capacity;
  }
  int64_t tiles() const { return std::max<int64_t>(levels_.tiles, 1); }
  void* keep(int64_t count, ScalarType type) {
    kept_.push_back(empty_of(like_, {count}, type));
    return kept_.back().mutable_data_ptr();
  }
  template <bool ordered, class Key>
  void insert(const Levels& levels, const Key& key, int32_t* slots) {
    insert_kernel<ordered><<<unsigned(tiles()), kThreads, 0, stream()>>>(levels, key, slots);
    launch_.check();
  }
  Launch launch_;
  Tensor like_;
  const char* op_;
  Levels levels_;
  Table below_[kMaxLevels] = {};
  int64_t pixels_ = 0, rows_ = 0;
  State* states_ = nullptr;
  int32_t* row_slots_ = nullptr;
  std::optional<Tensor> memory_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> number_windows(const Tensor& map, int64_t limit) {
  const int64_t N = map.size(0), H = map.size(1), W = map.size(2);
  Numbering numbering(map, "number_windows");
  numbering.add(N, H, W, std::min(limit, kMaxIds));
  const Tensor dense = torch::stable::contiguous(map);
  const int32_t* in = dense.const_data_ptr<int32_t>();
  Tensor index = empty_of(map, {N, H, W}, ScalarType::Int);
  int32_t* held = numbering.ints(numbering.rows() * 9);
  numbering.number_windows(RowKey{in}, in, index.mutable_data_ptr<int32_t>(), held);
  const int64_t count = numbering.wait();
  Tensor windows = empty_of(map, {count + 1, 9}, ScalarType::Int);
  if (count < 0) return {index, windows};
  numbering.check(cudaMemsetAsync(held, 0, 9 * sizeof(int32_t), numbering.stream()));
  numbering.check(cudaMemcpyAsync(windows.mutable_data_ptr(), held,
                                  size_t(count + 1) * 9 * sizeof(int32_t),
                                  cudaMemcpyDeviceToDevice, numbering.stream()));
  return {index, windows};
}

// Two numberings of each level, one upon the other; nothing waits for the device.
std::tuple<Tensor, Tensor, Tensor> number_levels(const Tensor& map, std::vector<int64_t> sizes,
                                                 std::vector<int64_t> limits) {
  const int64_t N = map.size(0), levels = int64_t(limits.size());
  if (levels > kMaxLevels)
    refuse("sizes: expected at most ", kMaxLevels, ", got ", levels, "; take them in turns");
  Numbering numbering(map, "number_levels");
  for (size_t l = 0; l < limits.size(); ++l)
    numbering.add(N, sizes[2 * l], sizes[2 * l + 1], std::min(limits[l], kMaxIds));
  const Tensor dense = torch::stable::contiguous(map);
  const int64_t pixels = numbering.pixels(), rows = numbering.rows();
  Tensor maps = empty_of(map, {3, pixels}, ScalarType::Int);
  Tensor windows = empty_of(map, {2, rows, 9}, ScalarType::Int);
  Tensor counts = empty_of(map, {2, levels}, ScalarType::Long);
  if (levels == 0) return {maps, windows, counts};
  numbering.clear(windows, 2 * rows * 9 * int64_t(sizeof(int32_t)));
  int32_t *symbols = maps.mutable_data_ptr<int32_t>(), *out = windows.mutable_data_ptr<int32_t>();
  int32_t *index3 = symbols + pixels, *index5 = index3 + pixels;
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int l = 0; l < levels; ++l) numbering[l].count = count + l;
  const ResizedRowKey resized{dense.const_data_ptr<int32_t>(), int32_t(map.size(1)),
                              int32_t(map.size(2)), symbols};
  numbering.number_windows(resized, symbols, index3, out);
  for (int l = 0; l < levels; ++l) {
    numbering[l].before = count + l;
    numbering[l].count = count + levels + l;
  }
  numbering.number_windows(RowKey{index3}, index3, index5, out + rows * 9);
  return {maps, windows, counts};
}

template <class T>
Tensor number_pixels(const Tensor& input, Numbering& numbering, int32_t* symbols) {
  const int64_t K = input.size(1);
  const Pixels<T> x{static_cast<const T*>(input.const_data_ptr()), int32_t(input.size(2)),
                    int32_t(input.size(3)), K, input.stride(0), input.stride(1), input.stride(2),
                    input.stride(3)};
  int32_t* firsts = numbering.ints(numbering.rows());
  numbering.make_tables(false);
  numbering.number(VectorKey<T>{x}, PutFirst{firsts}, SameVector<T>{x}, symbols);
  const int64_t count = numbering.wait();
  Tensor vectors =
      torch::stable::empty({count + 1, K}, input.scalar_type(), std::nullopt, input.device());
  if (count < 0) return vectors;
  vectors_kernel<T><<<grid((count + 1) * K), kThreads, 0, numbering.stream()>>>(
      x, firsts, count, static_cast<T*>(vectors.mutable_data_ptr()));
  numbering.check();
  return vectors;
}

std::tuple<Tensor, Tensor> number_vectors(const Tensor& input, int64_t limit) {
  const int64_t N = input.size(0), H = input.size(2), W = input.size(3);
  Numbering numbering(input, "number_vectors");
  numbering.add(N, H, W, limit);
  Tensor symbols = empty_of(input, {N, H, W}, ScalarType::Int);
  std::optional<Tensor> vectors;
  with_element(element_of(input, "number_vectors"), [&](auto t) {
    vectors = number_pixels<decltype(t)>(input, numbering, symbols.mutable_data_ptr<int32_t>());
  });
  if (vectors->size(0) == 0) torch::stable::zero_(symbols);
  return {symbols, *vectors};
}

// Nothing waits for the device: there is room for all kinds, and labels out of range are told.
std::tuple<Tensor, Tensor, Tensor> number_labels(const Tensor& labels,
                                                 const std::optional<Tensor>& edges,
                                                 int64_t classes) {
  const Launch launch(labels, "number_labels");
  const int64_t kinds = edges ? 2 * classes : classes, channels = classes + (edges ? 1 : 0);
  const int64_t pixels = labels.numel(), header = sizeof(FoundLabels) / sizeof(int32_t);
  if (classes < 0 || kinds >= kMaxIds)
    refuse("num_classes: expected fewer than ", kMaxIds, " symbols, got ", kinds);
  Tensor symbols = empty_of(
      labels, {labels.size(0), labels.size(1), labels.size(2)}, ScalarType::Int);
  Tensor vectors = empty_of(labels, {kinds + 2, channels}, ScalarType::Float);
  Tensor out = empty_of(labels, {header / 2}, ScalarType::Long);
  const Tensor scratch = empty_of(labels, {header + kinds}, ScalarType::Int);
  launch.clear(scratch.mutable_data_ptr(), (header + kinds) * int64_t(sizeof(int32_t)));
  launch.clear(vectors.mutable_data_ptr(), (kinds + 2) * channels * int64_t(sizeof(float)));
  auto* found = static_cast<FoundLabels*>(scratch.mutable_data_ptr());
  auto* ranks = reinterpret_cast<int32_t*>(found + 1);
  const Tensor dense = torch::stable::contiguous(labels);
  std::optional<Tensor> marks;
  if (edges) marks = torch::stable::contiguous(*edges);
  const auto* edge = marks ? marks->const_data_ptr<uint8_t>() : nullptr;
  with_ids(ids_of(labels, "labels"), [&](auto id) {
    using I = decltype(id);
    const LabelKinds<I> x{static_cast<const I*>(dense.const_data_ptr()), edge, classes, pixels};
    mark_kernel<I><<<grid(pixels), kThreads, 0, launch.stream>>>(x, ranks, found);
    launch.check();
    rank_kernel<<<1, kThreads, 0, launch.stream>>>(
        ranks, int32_t(kinds), int32_t(channels), edges.has_value(), found,
        static_cast<FoundLabels*>(out.mutable_data_ptr()),
        vectors.mutable_data_ptr<float>());
    launch.check();
    rank_pixels_kernel<I><<<grid(pixels), kThreads, 0, launch.stream>>>(
        x, ranks, int32_t(kinds + 1), symbols.mutable_data_ptr<int32_t>());
    launch.check();
  });
  return {symbols, vectors, out};
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("number_labels", TORCH_BOX(&number_labels));
  m.impl("number_levels", TORCH_BOX(&number_levels));
  m.impl("number_vectors", TORCH_BOX(&number_vectors));
  m.impl("number_windows", TORCH_BOX(&number_windows));
}

}  // namespace
}  // namespace smis::cuda
