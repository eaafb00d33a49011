// instance_pool and instance_means on CUDA: ids are numbered on the device, sums follow runs of one
// id down the columns, and nothing waits for the host (but the table, whose size it has to know).
#include "common/cuda.h"
#include "instance_pool/max_id.h"

namespace smis::cuda {
namespace {

constexpr int kRun = 8;                      // rows that a thread walks down, or 4 x pixels along
constexpr int64_t kSumBytes = 64 << 20;      // sums alive at a time, for as many ids as pixels
constexpr int64_t kLeastChannels = 8;

// (image, id) in open addressing, and what becomes of it. A key is never 0.
struct Table {
  unsigned long long* keys = nullptr;  // [capacity]
  int32_t* counts = nullptr;           // [capacity] pixels
  int32_t* rows = nullptr;             // [capacity] the row of the sums
  int64_t* total = nullptr;            // rows in use, and an id that is out of range, else 0
  int64_t capacity = 0;
};

struct PoolArgs {
  int64_t N = 0, C = 0, H = 0, W = 0;
  int64_t c0 = 0, channels = 0;  // this block of channels
  Operand x, out;
  const int32_t* slots = nullptr;  // (N, H, W), -1 where the id is out of range
  double* sums = nullptr;          // (rows, channels)
  void* means = nullptr;           // of the accumulation type, over the sums or apart
  int64_t mean_row = 0;            // elements between its rows
  Table table;
};

__device__ int32_t insert(const Table& t, unsigned long long key) {
  const unsigned long long mask = (unsigned long long)(t.capacity - 1);
  unsigned long long i = (key * 0x9E3779B97F4A7C15ull >> 32) & mask;
  for (;;) {
    const unsigned long long held = atomicCAS(t.keys + i, 0ull, key);
    if (held == 0ull || held == key) return int32_t(i);
    i = (i + 1) & mask;
  }
}

// The slot of every pixel. Only the first lane of a run of equal ids touches the table.
template <class Id>
__global__ void number_kernel(const Id* ids, int64_t pixels, int64_t plane, Table t, int32_t* slots) {
  const int lane = threadIdx.x & kLane;
  for (int64_t start = thread_index() - lane; start < pixels; start += thread_stride()) {
    const int64_t p = start + lane;
    const bool inside = p < pixels;
    const long long id = inside ? (long long)(ids[p]) : -1;
    const bool valid = inside && id >= 0 && id <= kMaxId;
    const unsigned long long key =
        valid ? ((unsigned long long)(p / plane) << 32 | (unsigned long long)(id)) + 1 : 0ull;
    const unsigned long long left = __shfl_up_sync(kWarp, key, 1);
    const unsigned heads = __ballot_sync(kWarp, lane == 0 || key != left);
    const int head = 31 - __clz(int(heads & (kWarp >> (31 - lane))));
    int32_t slot = -1;
    if (lane == head && valid) {
      const unsigned after = lane == 31 ? 0u : heads >> (lane + 1);
      const int length = after == 0u ? 32 - lane : __ffs(int(after));
      slot = insert(t, key);
      atomicAdd(t.counts + slot, length);
    }
    if (inside && !valid) t.total[1] = id;
    slot = __shfl_sync(kWarp, slot, head);
    if (inside) slots[p] = slot;
  }
}

// A row of the sums for every key.
__global__ void compact_kernel(Table t) {
  const int lane = threadIdx.x & kLane;
  for (int64_t start = thread_index() - lane; start < t.capacity; start += thread_stride()) {
    const int64_t i = start + lane;
    const bool used = i < t.capacity && t.keys[i] != 0ull;
    const unsigned users = __ballot_sync(kWarp, used);
    int32_t first = 0;
    if (lane == 0 && users != 0u) first = int32_t(atomicAdd(reinterpret_cast<unsigned long long*>(t.total),
                              (unsigned long long)(__popc(users))));
    first = __shfl_sync(kWarp, first, 0);
    if (used) t.rows[i] = first + __popc(users & ((1u << lane) - 1u));
  }
}

__global__ void clear_kernel(PoolArgs a) {
  const int64_t count = *a.table.total * a.channels;
  for (int64_t i = thread_index(); i < count; i += thread_stride()) a.sums[i] = 0;
}

// Sums of the lanes that share a slot: one atomic for each slot of many lanes, and one for each lane
// of a slot that few share. All lanes take part; those with slot -1 add nothing.
template <class A, int CH>
__device__ void add_runs(const PoolArgs& a, int64_t c, int count, int32_t slot, const A (&sum)[CH]) {
  constexpr int kFew = 3;
  const int lane = threadIdx.x & kLane;
  const unsigned peers = __match_any_sync(kWarp, slot);
  const bool few = __popc(peers) <= kFew;
  if (slot >= 0 && few) {
    double* row = a.sums + int64_t(a.table.rows[slot]) * a.channels + c;
    for (int k = 0; k < CH; ++k)
      if (k < count) atomicAdd(row + k, double(sum[k]));
  }
  unsigned left = __ballot_sync(kWarp, slot >= 0 && !few);
  while (left != 0u) {
    const int leader = __ffs(int(left)) - 1;
    const int32_t shared = __shfl_sync(kWarp, slot, leader);
    double* row = a.sums + int64_t(a.table.rows[shared]) * a.channels + c;
    for (int k = 0; k < CH; ++k) {
      double total = slot == shared ? double(sum[k]) : 0;
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
      if (lane == leader && k < count) atomicAdd(row + k, total);
    }
    left &= ~__ballot_sync(kWarp, slot == shared);
  }
}

// A warp takes 32 columns and walks down kRun rows: reads are coalesced, and a column changes its
// id rarely. blockIdx.y: image, group of channels.
template <class T, int CH> __global__ void sum_planes_kernel(PoolArgs a) {
  using A = Acc<T>;
  const int64_t groups = (a.channels + CH - 1) / CH, strips = (a.H + kRun - 1) / kRun;
  const int64_t tiles = (a.W + 31) / 32 * strips;
  const int lane = threadIdx.x & kLane;
  for (int64_t group = blockIdx.y; group < a.N * groups; group += gridDim.y) {
    const int64_t n = group / groups, c = group % groups * CH;
    const int count = int(a.channels - c < CH ? a.channels - c : CH);
    const T* x = static_cast<const T*>(a.x.data) + n * a.x.n + (a.c0 + c) * a.x.c;
    const int32_t* slots = a.slots + n * a.H * a.W;
    for (int64_t tile = thread_index() / 32; tile < tiles; tile += thread_stride() / 32) {
      const int64_t column = tile / strips * 32 + lane, first = tile % strips * kRun;
      const int64_t last = first + kRun < a.H ? first + kRun : a.H;
      const bool inside = column < a.W;
      int32_t slot = -1;
      A sum[CH];
      for (int k = 0; k < CH; ++k) sum[k] = A(0);
      for (int64_t y = first; y < last; ++y) {
        const int64_t p = y * a.W + column;
        const int32_t now = inside ? slots[p] : -1;
        if (__any_sync(kWarp, now != slot && slot >= 0)) {
          add_runs<A, CH>(a, c, count, now != slot ? slot : -1, sum);
        }
        if (now != slot)
          for (int k = 0; k < CH; ++k) sum[k] = A(0);
        slot = now;
        if (inside)
          for (int k = 0; k < CH; ++k)
            if (k < count) sum[k] += load(x[p * a.x.p + k * a.x.c]);
      }
      add_runs<A, CH>(a, c, count, slot, sum);
    }
  }
}

// Channels last: a warp takes 32 channels of 4 * kRun consecutive pixels of one image.
template <class T> __global__ void sum_rows_kernel(PoolArgs a) {
  using A = Acc<T>;
  const int64_t pixels = a.H * a.W, groups = (a.channels + 31) / 32;
  const int64_t pieces = (pixels + 4 * kRun - 1) / (4 * kRun);
  const int lane = threadIdx.x & kLane;
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y)
    for (int64_t i = thread_index() / 32; i < pieces * groups; i += thread_stride() / 32) {
      const int64_t c = i % groups * 32 + lane, first = i / groups * 4 * kRun;
      const int64_t last = first + 4 * kRun < pixels ? first + 4 * kRun : pixels;
      const bool inside = c < a.channels;
      const T* x = static_cast<const T*>(a.x.data) + n * a.x.n + a.c0 + c;
      int32_t slot = -1;
      A sum = A(0);
      for (int64_t p = first; p < last; ++p) {
        const int32_t now = a.slots[n * pixels + p];
        if (now != slot) {
          if (slot >= 0 && inside)
            atomicAdd(a.sums + int64_t(a.table.rows[slot]) * a.channels + c, double(sum));
          sum = A(0);
          slot = now;
        }
        if (inside) sum += load(x[p * a.x.p]);
      }
      if (slot >= 0 && inside)
        atomicAdd(a.sums + int64_t(a.table.rows[slot]) * a.channels + c, double(sum));
    }
}

// A warp takes a row. Means may lie over its sums: the 32 that are written lie over sums that this
// step or an earlier one has read.
template <class A> __global__ void divide_kernel(PoolArgs a) {
  for (int64_t i = thread_index() / 32; i < a.table.capacity; i += thread_stride() / 32) {
    if (a.table.keys[i] == 0ull) continue;
    const double* sums = a.sums + int64_t(a.table.rows[i]) * a.channels;
    A* means = static_cast<A*>(a.means) + int64_t(a.table.rows[i]) * a.mean_row;
    const double count = a.table.counts[i];
    for (int64_t c = threadIdx.x & kLane; c - (threadIdx.x & kLane) < a.channels; c += 32) {
      const bool inside = c < a.channels;
      const A mean = inside ? A(sums[c] / count) : A(0);
      __syncwarp();
      if (inside) means[c] = mean;
    }
  }
}

template <class A> __device__ A mean_at(const PoolArgs& a, int32_t slot, int64_t c) {
  // An id out of range: the host was not made to wait for the check, so the pixel shows it.
  if (slot < 0) return A(nanf(""));
  return static_cast<const A*>(a.means)[int64_t(a.table.rows[slot]) * a.mean_row + c];
}

template <class T, int V> __global__ void spread_planes_kernel(PoolArgs a) {
  using A = Acc<T>;
  const int64_t pixels = a.H * a.W;
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    T* out = static_cast<T*>(a.out.data) + n * a.out.n + a.c0 * a.out.c;
    for (int64_t i = thread_index(); i < pixels / V; i += thread_stride()) {
      int32_t slot[V];
      for (int j = 0; j < V; ++j) slot[j] = a.slots[n * pixels + i * V + j];
      for (int64_t c = 0; c < a.channels; ++c) {
        Pack<T, V> pack;
        for (int j = 0; j < V; ++j) pack.v[j] = rounded<T>(mean_at<A>(a, slot[j], c));
        *reinterpret_cast<Pack<T, V>*>(out + c * a.out.c + i * V) = pack;
      }
    }
  }
}

template <class T> __global__ void spread_rows_kernel(PoolArgs a) {
  using A = Acc<T>;
  const int64_t pixels = a.H * a.W;
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    T* out = static_cast<T*>(a.out.data) + n * a.out.n + a.c0;
    for (int64_t i = thread_index(); i < pixels * a.channels; i += thread_stride()) {
      const int64_t p = i / a.channels, c = i % a.channels;
      out[p * a.out.p + c] = rounded<T>(mean_at<A>(a, a.slots[n * pixels + p], c));
    }
  }
}

__global__ void list_kernel(Table t, int64_t* image, int64_t* ids, int64_t* counts) {
  for (int64_t i = thread_index(); i < t.capacity; i += thread_stride()) {
    if (t.keys[i] == 0ull) continue;
    const unsigned long long key = t.keys[i] - 1;
    const int32_t row = t.rows[i];
    image[row] = int64_t(key >> 32);
    ids[row] = int64_t(key & 0xffffffffull);
    counts[row] = t.counts[i];
  }
}

// The numbered map: its memory, and the table that points into it.
struct Numbered {
  Tensor keys, counts, rows, total, slots;
  Table table;
};

Numbered number(const Tensor& instance_map, const Launch& launch) {
  const Tensor map = torch::stable::contiguous(instance_map);
  const int64_t pixels = map.numel();
  if (pixels > int64_t(1) << 29)
    refuse("instance_map: expected at most 2^29 pixels, got ", pixels,
           "; take fewer images at a time");
  Numbered found;
  Table& t = found.table;
  for (t.capacity = 1024; t.capacity < 2 * pixels;) t.capacity *= 2;
  found.keys = empty_of(map, {t.capacity}, ScalarType::Long);
  found.counts = empty_of(map, {t.capacity}, ScalarType::Int);
  found.rows = empty_of(map, {t.capacity}, ScalarType::Int);
  found.total = empty_of(map, {2}, ScalarType::Long);
  found.slots = empty_of(map, {pixels}, ScalarType::Int);
  t.keys = static_cast<unsigned long long*>(found.keys.mutable_data_ptr());
  t.counts = static_cast<int32_t*>(found.counts.mutable_data_ptr());
  t.rows = static_cast<int32_t*>(found.rows.mutable_data_ptr());
  t.total = static_cast<int64_t*>(found.total.mutable_data_ptr());
  launch.clear(t.keys, t.capacity * 8);
  launch.clear(t.counts, t.capacity * 4);
  launch.clear(t.total, 16);
  const int64_t plane = map.size(1) * map.size(2);
  with_ids(ids_of(map, "instance_map"), [&](auto tag) {
    using Id = decltype(tag);
    number_kernel<Id><<<grid(pixels), kThreads, 0, launch.stream>>>(
        static_cast<const Id*>(map.const_data_ptr()), pixels, plane, t,
        static_cast<int32_t*>(found.slots.mutable_data_ptr()));
  });
  launch.check();
  compact_kernel<<<grid(t.capacity), kThreads, 0, launch.stream>>>(t);
  launch.check();
  return found;
}

PoolArgs arguments(const Tensor& x, const Numbered& numbered) {
  PoolArgs a;
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.x = operand(x);
  a.slots = static_cast<const int32_t*>(numbered.slots.const_data_ptr());
  a.table = numbered.table;
  return a;
}

template <class T> void sum_block(const PoolArgs& a, bool last, const Launch& launch) {
  using A = Acc<T>;
  clear_kernel<<<grid(a.H * a.W), kThreads, 0, launch.stream>>>(a);
  launch.check();
  if (last && a.channels >= 16) {
    const int64_t warps = ceil_div(a.H * a.W, 4 * kRun) * ceil_div(a.channels, 32);
    sum_rows_kernel<T><<<grid(32 * warps, a.N), kThreads, 0, launch.stream>>>(a);
  } else {
    const int64_t threads = ceil_div(a.W, 32) * 32 * ceil_div(a.H, kRun);
    if (a.channels < 8)
      sum_planes_kernel<T, 1><<<grid(threads, a.N * a.channels), kThreads, 0, launch.stream>>>(a);
    else
      sum_planes_kernel<T, 4>
          <<<grid(threads, a.N * ceil_div(a.channels, 4)), kThreads, 0, launch.stream>>>(a);
  }
  launch.check();
  divide_kernel<A><<<grid(a.table.capacity), kThreads, 0, launch.stream>>>(a);
  launch.check();
}

template <class T> void spread_block(const PoolArgs& a, bool last, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const int64_t pixels = a.H * a.W;
  if (last)
    spread_rows_kernel<T><<<grid(pixels * a.channels, a.N), kThreads, 0, launch.stream>>>(a);
  else if (pixels % V == 0)
    spread_planes_kernel<T, V><<<grid(pixels / V, a.N), kThreads, 0, launch.stream>>>(a);
  else
    spread_planes_kernel<T, 1><<<grid(pixels, a.N), kThreads, 0, launch.stream>>>(a);
  launch.check();
}

Tensor instance_pool(const Tensor& input, const Tensor& instance_map) {
  const Launch launch(input, "instance_avg_pool2d");
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  Tensor out = empty_nchw(x.size(0), x.size(1), x.size(2), x.size(3), last, x);
  if (out.numel() == 0) return out;
  const Numbered numbered = number(instance_map, launch);
  PoolArgs a = arguments(x, numbered);
  a.out = operand(out);
  const int64_t rows = a.N * a.H * a.W;
  const int64_t block = std::min(std::max(kSumBytes / (rows * 8), kLeastChannels), a.C);
  const Tensor sums = empty_of(x, {rows * block}, ScalarType::Double);
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  a.means = a.sums;
  with_element(element_of(x, "instance_avg_pool2d"), [&](auto tag) {
    using T = decltype(tag);
    for (a.c0 = 0; a.c0 < a.C; a.c0 += block) {
      a.channels = std::min(block, a.C - a.c0);
      a.mean_row = a.channels * int64_t(sizeof(double) / sizeof(Acc<T>));
      sum_block<T>(a, last, launch);
      spread_block<T>(a, last, launch);
    }
  });
  return out;
}

// (image, id, mean, count) of every instance, in no order.
std::tuple<Tensor, Tensor, Tensor, Tensor> instance_means(const Tensor& input,
                                                          const Tensor& instance_map) {
  const Launch launch(input, "instance_mean_table");
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  const Numbered numbered = number(instance_map, launch);
  int64_t total[2];
  launch.fetch(&total, numbered.table.total);
  check_ids(total[1]);
  PoolArgs a = arguments(x, numbered);
  const int64_t rows = total[0];
  Tensor image = empty_of(x, {rows}, ScalarType::Long), ids = empty_of(x, {rows}, ScalarType::Long);
  Tensor counts = empty_of(x, {rows}, ScalarType::Long);
  Tensor mean = empty_of(x, {rows, a.C}, acc_type(x));
  const Tensor sums = empty_of(x, {rows, a.C}, ScalarType::Double);
  list_kernel<<<grid(a.table.capacity), kThreads, 0, launch.stream>>>(
      a.table, static_cast<int64_t*>(image.mutable_data_ptr()),
      static_cast<int64_t*>(ids.mutable_data_ptr()),
      static_cast<int64_t*>(counts.mutable_data_ptr()));
  launch.check();
  a.channels = a.mean_row = a.C;
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  a.means = mean.mutable_data_ptr();
  with_element(element_of(x, "instance_mean_table"),
               [&](auto tag) { sum_block<decltype(tag)>(a, last, launch); });
  return {image, ids, mean, counts};
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("instance_pool", TORCH_BOX(&instance_pool));
  m.impl("instance_means", TORCH_BOX(&instance_means));
}

}  // namespace
}  // namespace smis::cuda
