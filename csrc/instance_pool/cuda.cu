// instance_pool and instance_means on CUDA: ids are numbered on the device, sums follow runs of one
// id down the columns, and nothing waits for the host (but the table, whose size it has to know).
#include "common/cuda.h"
#include "instance_pool/max_id.h"

namespace smis::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRun = 8;                      // rows that a thread walks down, or 4 x pixels along
constexpr int kPixels = 8;                   // that a thread numbers
constexpr int kRecent = 256;                 // owners that a block remembers
constexpr int64_t kSumBytes = 64 << 20;      // sums alive at a time, for as many ids as pixels
constexpr int64_t kLeastChannels = 8;

// Instances in open addressing. One is known by the first of its pixels to arrive, its owner.
struct Instances {
  int64_t* total = nullptr;  // rows in use, and an id that is out of range, else 0
  int32_t* table = nullptr;  // [capacity] an owner + 1, or 0
  int32_t capacity = 0;
  int32_t* owners =
      nullptr;  // (N, H, W): -2 - the row of an owner, another pixel's owner, -1 for none
  int32_t plane = 1;
  Divider<int32_t> by_plane;
};

struct PoolArgs {
  int64_t N = 0, C = 0, H = 0, W = 0;
  int64_t c0 = 0, channels = 0;  // this block of channels
  Operand x, out;
  const int32_t* owners = nullptr;
  const int64_t* total = nullptr;
  int32_t* counts = nullptr;  // (rows) pixels, over the table; counted with the first channels
  double* sums = nullptr;     // (rows, channels)
  void* means = nullptr;      // of the accumulation type, over the sums or apart
  int mean_step = 1;          // elements from one to the next
};

template <class Id>
__device__ bool same(const Id* ids, const Instances& t, int32_t p, long long id, int32_t image) {
  return (long long)(ids[p]) == id && t.by_plane(p) == image;
}

// The owner of the instance of pixel p, which becomes it where there is none.
template <class Id> __device__ int32_t find(const Id* ids, const Instances& t, int32_t p,
                                            uint32_t hash, int32_t image) {
  for (int32_t i = int32_t(uint64_t(hash) * uint32_t(t.capacity) >> 32);;) {
    int32_t held = now(t.table[i]);  // most find it there
    if (held == 0) held = atomicCAS(t.table + i, 0, p + 1);
    if (held == 0) return p;
    if (same(ids, t, held - 1, (long long)(ids[p]), image)) return held - 1;
    i = i + 1 == t.capacity ? 0 : i + 1;
  }
}

// The owner of every pixel and the rows of the owners. Only the first lane of a run of equal ids
// looks for it: among those that the block met last, then in the table.
template <class Id> __global__ void number_kernel(const Id* ids, int64_t pixels, Instances t) {
  __shared__ int32_t recent[kRecent];
  const int lane = threadIdx.x & kLane, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kRecent; i += blockDim.x) recent[i] = 0;
  __syncthreads();
  const int64_t pieces = (pixels + 31) / 32, stride = int64_t(gridDim.x) * kWarps * kPixels;
  for (int64_t first = int64_t(blockIdx.x) * kWarps * kPixels; first < pieces; first += stride)
    for (int64_t piece = first + warp; piece < pieces && piece < first + kWarps * kPixels;
         piece += kWarps) {
      const int64_t p = piece * 32 + lane;
      const bool inside = p < pixels;
      const long long id = inside ? (long long)(ids[p]) : -1;
      const bool valid = inside && id >= 0 && id <= kMaxId;
      const int32_t image = inside ? t.by_plane(int32_t(p)) : 0;
      const unsigned long long key =
          valid ? ((unsigned long long)(image) << 32 | (unsigned long long)(id)) + 1 : 0ull;
      const unsigned long long left = __shfl_up_sync(kWarp, key, 1);
      const unsigned heads = __ballot_sync(kWarp, lane == 0 || key != left);
      const int head = 31 - __clz(int(heads & (kWarp >> (31 - lane))));
      int32_t owner = -1;
      bool found = false;
      if (lane == head && valid) {
        const uint32_t hash = uint32_t(key * 0x9E3779B97F4A7C15ull >> 32);
        int32_t* last = recent + hash % kRecent;
        owner = now(*last) - 1;
        if (owner < 0 || !same(ids, t, owner, id, image)) {
          owner = find(ids, t, int32_t(p), hash, image);
          found = owner == int32_t(p);
          atomicExch(last, owner + 1);
        }
      }
      const unsigned founders = __ballot_sync(kWarp, found);
      int32_t row = 0;
      if (lane == 0 && founders != 0u)
        row = int32_t(atomicAdd(reinterpret_cast<unsigned long long*>(t.total),
                                (unsigned long long)(__popc(founders))));
      row = __shfl_sync(kWarp, row, 0) + __popc(founders & ((1u << lane) - 1u));
      owner = __shfl_sync(kWarp, owner, head);
      if (inside && !valid) t.total[1] = id;
      if (inside) t.owners[p] = found ? -2 - row : owner;
    }
}

// Its own owner too; -1 for an id out of range.
__device__ int32_t owner_at(const PoolArgs& a, int64_t p) {
  const int32_t owner = a.owners[p];
  return owner < -1 ? int32_t(p) : owner;
}
__device__ int64_t row_of(const PoolArgs& a, int32_t owner) {
  return -2 - int64_t(a.owners[owner]);
}

__global__ void clear_kernel(PoolArgs a) {
  const int64_t rows = *a.total;
  for (int64_t i = thread_index(); i < rows * a.channels; i += thread_stride()) a.sums[i] = 0;
  if (a.c0 != 0) return;
  for (int64_t i = thread_index(); i < rows; i += thread_stride()) a.counts[i] = 0;
}

// Sums of the lanes that share an owner: one atomic for each owner of many lanes, and one for each
// lane of an owner that few share. All lanes take part; those of owner -1 add nothing.
template <class A, int CH> __device__ void add_runs(const PoolArgs& a, int64_t c, int count,
                                                    int32_t owner, int32_t seen,
                                                    const A (&sum)[CH]) {
  constexpr int kFew = 3;
  const int lane = threadIdx.x & kLane;
  const bool counted = a.c0 + c == 0;
  const unsigned peers = __match_any_sync(kWarp, owner);
  const bool few = __popc(peers) <= kFew;
  if (owner >= 0 && few) {
    const int64_t row = row_of(a, owner);
    double* sums = a.sums + row * a.channels + c;
    for (int k = 0; k < CH; ++k)
      if (k < count) atomicAdd(sums + k, double(sum[k]));
    if (counted) atomicAdd(a.counts + row, seen);
  }
  unsigned left = __ballot_sync(kWarp, owner >= 0 && !few);
  while (left != 0u) {
    const int leader = __ffs(int(left)) - 1;
    const int32_t shared = __shfl_sync(kWarp, owner, leader);
    const int64_t row = row_of(a, shared);
    double* sums = a.sums + row * a.channels + c;
    for (int k = 0; k < CH; ++k) {
      double total = owner == shared ? double(sum[k]) : 0;
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
      if (lane == leader && k < count) atomicAdd(sums + k, total);
    }
    if (counted) {
      int32_t total = owner == shared ? seen : 0;
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
      if (lane == leader) atomicAdd(a.counts + row, total);
    }
    left &= ~__ballot_sync(kWarp, owner == shared);
  }
}

// A warp takes 32 columns and walks down kRun rows: reads are coalesced, and a column changes its
// id rarely. What the warps of a block end with is added once. blockIdx.y: image, group of
// channels.
template <class T, int CH> __global__ void sum_planes_kernel(PoolArgs a) {
  using A = Acc<T>;
  __shared__ double block_sums[kWarps][CH];
  __shared__ int32_t block_owners[kWarps];
  __shared__ int32_t block_seen[kWarps];
  const int64_t groups = (a.channels + CH - 1) / CH;
  const int32_t height = int32_t(a.H), width = int32_t(a.W), strips = (height + kRun - 1) / kRun;
  const int32_t tiles = (width + 31) / 32 * strips;
  const int lane = threadIdx.x & kLane, warp = threadIdx.x / 32;
  for (int64_t group = blockIdx.y; group < a.N * groups; group += gridDim.y) {
    const int64_t n = group / groups, c = group % groups * CH, image = n * height * width;
    const int count = int(a.channels - c < CH ? a.channels - c : CH);
    const T* x = static_cast<const T*>(a.x.data) + n * a.x.n + (a.c0 + c) * a.x.c;
    for (int64_t base = int64_t(blockIdx.x) * kWarps; base < tiles;
         base += int64_t(gridDim.x) * kWarps) {
      const int32_t tile = int32_t(base) + warp;
      const int32_t column = tile / strips * 32 + lane, top = tile % strips * kRun;
      const int32_t bottom = tile >= tiles ? top : top + kRun < height ? top + kRun : height;
      int32_t owner = -1, seen = 0, next = -1;
      T ahead[CH];
      A sum[CH];
      for (int k = 0; k < CH; ++k) sum[k] = A(0);
      const auto fetch = [&](int32_t y) {
        if (y >= bottom || column >= width) return;
        const int64_t p = int64_t(y) * width + column;
        next = owner_at(a, image + p);
        for (int k = 0; k < CH; ++k)
          if (k < count) ahead[k] = x[p * a.x.p + k * a.x.c];
      };
      fetch(top);
      for (int32_t y = top; y < bottom; ++y) {
        const int32_t here = next;
        A value[CH];
        for (int k = 0; k < CH; ++k) value[k] = here >= 0 && k < count ? load(ahead[k]) : A(0);
        fetch(y + 1);  // under way while this row is added
        const bool over = here != owner;
        if (__any_sync(kWarp, over && owner >= 0))
          add_runs<A, CH>(a, c, count, over ? owner : -1, seen, sum);
        for (int k = 0; k < CH; ++k) sum[k] = over ? value[k] : sum[k] + value[k];
        seen = over ? 1 : seen + 1;
        owner = here;
      }
      // A warp of one owner leaves its sums to the block.
      const int32_t one = __shfl_sync(kWarp, owner, 0);
      const bool whole = __all_sync(kWarp, owner >= 0 && owner == one);
      if (!whole) add_runs<A, CH>(a, c, count, owner, seen, sum);
      if (whole) {
        for (int k = 0; k < CH; ++k) {
          double total = double(sum[k]);
          for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
          if (lane == 0) block_sums[warp][k] = total;
        }
        for (int step = 16; step > 0; step /= 2) seen += __shfl_xor_sync(kWarp, seen, step);
      }
      if (lane == 0) {
        block_owners[warp] = whole ? owner : -1;
        block_seen[warp] = seen;
      }
      __syncthreads();
      if (warp == 0) {
        owner = lane < kWarps ? block_owners[lane] : -1;
        double total[CH];
        for (int k = 0; k < CH; ++k) total[k] = owner >= 0 ? block_sums[lane][k] : 0;
        add_runs<double, CH>(a, c, count, owner, owner >= 0 ? block_seen[lane] : 0, total);
      }
      __syncthreads();
    }
  }
}

// Channels last: a warp takes 32 channels of 4 * kRun consecutive pixels of one image, a block the
// pieces that follow each other.
template <class T> __global__ void sum_rows_kernel(PoolArgs a) {
  using A = Acc<T>;
  constexpr int kPiece = 4 * kRun;
  static_assert(kPiece == 32, "a lane holds the owner of one pixel");
  __shared__ double block_sums[kWarps][32];
  __shared__ int32_t block_owners[kWarps];
  __shared__ int32_t block_seen[kWarps];
  const int64_t pixels = a.H * a.W, groups = (a.channels + 31) / 32;
  const int64_t bundles = (pixels + kWarps * kPiece - 1) / (kWarps * kPiece);
  const int lane = threadIdx.x & kLane, warp = threadIdx.x / 32;
  const auto add = [&](int32_t owner, int64_t c, double sum, int32_t seen) {
    const int64_t row = row_of(a, owner);
    if (c < a.channels) atomicAdd(a.sums + row * a.channels + c, sum);
    if (a.c0 + c == 0) atomicAdd(a.counts + row, seen);
  };
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y)
    for (int64_t i = blockIdx.x; i < bundles * groups; i += gridDim.x) {
      const int64_t bundle = i / groups, c = (i - bundle * groups) * 32 + lane;
      const int64_t first = (bundle * kWarps + warp) * kPiece;
      const int count = int(first >= pixels           ? 0
                            : first + kPiece < pixels ? kPiece
                                                      : pixels - first);
      const T* x = static_cast<const T*>(a.x.data) + n * a.x.n + a.c0 + c + first * a.x.p;
      const int32_t owners = lane < count ? owner_at(a, n * pixels + first + lane) : -1;
      int32_t owner = -1, seen = 0;
      A sum = A(0);
      for (int part = 0; part < count; part += kRun) {
        T values[kRun];
#pragma unroll
        for (int k = 0; k < kRun; ++k)
          if (part + k < count && c < a.channels) values[k] = x[(part + k) * a.x.p];
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (part + k >= count) break;
          const int32_t here = __shfl_sync(kWarp, owners, part + k);
          if (here != owner) {
            if (owner >= 0) add(owner, c, double(sum), seen);
            sum = A(0), seen = 0, owner = here;
          }
          if (c < a.channels) sum += load(values[k]);
          ++seen;
        }
      }
      block_sums[warp][lane] = double(sum);
      if (lane == 0) {
        block_owners[warp] = owner;
        block_seen[warp] = seen;
      }
      __syncthreads();
      bool leads = owner >= 0;
      for (int w = 0; w < warp; ++w) leads = leads && block_owners[w] != owner;
      if (leads) {
        double total = 0;
        int32_t all = 0;
        for (int w = warp; w < kWarps; ++w)
          if (block_owners[w] == owner) {
            total += block_sums[w][lane];
            all += block_seen[w];
          }
        add(owner, c, total, all);
      }
      __syncthreads();
    }
}

// 2^shift threads take a row.
template <class A> __global__ void divide_kernel(PoolArgs a, int shift) {
  const int64_t rows = *a.total;
  for (int64_t row = thread_index() >> shift; row < rows; row += thread_stride() >> shift) {
    const double count = a.counts[row];
    for (int64_t c = threadIdx.x & ((1 << shift) - 1); c < a.channels; c += 1 << shift) {
      const int64_t at = row * a.channels + c;
      static_cast<A*>(a.means)[at * a.mean_step] = A(a.sums[at] / count);
    }
  }
}

// Where the means of a pixel begin, -1 for none.
__device__ int64_t means_at(const PoolArgs& a, int32_t owner) {
  return owner < 0 ? -1 : row_of(a, owner) * a.channels * a.mean_step;
}
template <class T> __device__ T mean_at(const PoolArgs& a, int64_t means, int64_t c) {
  // An id out of range: the host was not made to wait for the check, so the pixel shows it.
  if (means < 0) return rounded<T>(Acc<T>(nanf("")));
  return rounded<T>(static_cast<const Acc<T>*>(a.means)[means + c * a.mean_step]);
}

template <class T, int V> __global__ void spread_planes_kernel(PoolArgs a) {
  const int64_t pixels = a.H * a.W;
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    T* out = static_cast<T*>(a.out.data) + n * a.out.n + a.c0 * a.out.c;
    for (int64_t i = thread_index(); i < pixels / V; i += thread_stride()) {
      const int64_t p = n * pixels + i * V;
      const auto owners = *reinterpret_cast<const Pack<int32_t, V>*>(a.owners + p);
      int64_t means[V];
      for (int j = 0; j < V; ++j)
        means[j] = means_at(a, owners.v[j] < -1 ? int32_t(p + j) : owners.v[j]);
      for (int64_t c = 0; c < a.channels; ++c) {
        Pack<T, V> pack;
        for (int j = 0; j < V; ++j) pack.v[j] = mean_at<T>(a, means[j], c);
        store_whole(out + c * a.out.c + i * V, pack);
      }
    }
  }
}

// Channels last: V channels of a pixel are a pack.
template <class T, int V, class I>
__global__ void spread_rows_kernel(PoolArgs a, Divider<I> by_packs) {
  const int64_t pixels = a.H * a.W;
  const I packs = I(a.channels / V);
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    T* out = static_cast<T*>(a.out.data) + n * a.out.n + a.c0;
    for (int64_t i = thread_index(); i < pixels * packs; i += thread_stride()) {
      I c = I(i);
      const I p = split(c, by_packs, packs);
      const int64_t means = means_at(a, owner_at(a, n * pixels + p));
      Pack<T, V> pack;
      for (int j = 0; j < V; ++j) pack.v[j] = mean_at<T>(a, means, int64_t(c) * V + j);
      store_whole(out + p * a.out.p + int64_t(c) * V, pack);
    }
  }
}

template <class Id> __global__ void list_kernel(const Id* ids, int64_t pixels, Instances t,
                                                const int32_t* held, int64_t* image, int64_t* id,
                                                int64_t* counts) {
  for (int64_t p = thread_index(); p < pixels; p += thread_stride()) {
    const int32_t owner = t.owners[p];
    if (owner >= -1) continue;
    const int32_t row = -2 - owner;
    image[row] = t.by_plane(int32_t(p));
    id[row] = int64_t(ids[p]);
    counts[row] = held[row];
  }
}

// The numbered map: its memory, and what points into it.
struct Numbered {
  Tensor map, table, owners;
  Instances instances;
};

Numbered number(const Tensor& instance_map, const Launch& launch) {
  Numbered found;
  found.map = torch::stable::contiguous(instance_map);
  const int64_t pixels = found.map.numel();
  if (pixels > int64_t(1) << 29)
    refuse("instance_map: expected at most 2^29 pixels, got ", pixels,
           "; take fewer images at a time");
  Instances& t = found.instances;
  t.plane = int32_t(found.map.size(1) * found.map.size(2));
  t.by_plane = Divider<int32_t>(t.plane);
  t.capacity = int32_t(pixels + pixels / 4 + 1);  // four of five are taken at most
  const int64_t bytes = 16 + int64_t(t.capacity) * 4;
  found.table = empty_of(found.map, {ceil_div(bytes, 8)}, ScalarType::Long);
  found.owners = empty_of(found.map, {pixels}, ScalarType::Int);
  t.total = static_cast<int64_t*>(found.table.mutable_data_ptr());
  t.table = reinterpret_cast<int32_t*>(t.total + 2);
  t.owners = static_cast<int32_t*>(found.owners.mutable_data_ptr());
  launch.clear(t.total, bytes);
  with_ids(ids_of(found.map, "instance_map"), [&](auto tag) {
    using Id = decltype(tag);
    number_kernel<Id><<<grid(ceil_div(pixels, kPixels)), kThreads, 0, launch.stream>>>(
        static_cast<const Id*>(found.map.const_data_ptr()), pixels, t);
  });
  launch.check();
  return found;
}

PoolArgs arguments(const Tensor& x, const Numbered& numbered) {
  PoolArgs a;
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.x = operand(x);
  a.owners = numbered.instances.owners;
  a.total = numbered.instances.total;
  a.counts = numbered.instances.table;  // which has been read
  return a;
}

// For work whose amount the device alone knows.
dim3 some(int64_t most) { return grid(std::min(most, int64_t(1) << 18)); }

template <class T> void sum_block(const PoolArgs& a, bool last, const Launch& launch) {
  using A = Acc<T>;
  const int64_t pixels = a.H * a.W, rows = a.N * pixels;
  clear_kernel<<<some(rows * a.channels), kThreads, 0, launch.stream>>>(a);
  launch.check();
  if (last && a.channels >= 16) {
    const int64_t warps = ceil_div(pixels, kWarps * 4 * kRun) * kWarps * ceil_div(a.channels, 32);
    sum_rows_kernel<T><<<grid(32 * warps, a.N), kThreads, 0, launch.stream>>>(a);
  } else {
    const int64_t threads = ceil_div(a.W, 32) * 32 * ceil_div(a.H, kRun);
    if (a.channels == 1)
      sum_planes_kernel<T, 1><<<grid(threads, a.N), kThreads, 0, launch.stream>>>(a);
    else
      sum_planes_kernel<T, 4>
          <<<grid(threads, a.N * ceil_div(a.channels, 4)), kThreads, 0, launch.stream>>>(a);
  }
  launch.check();
  int shift = 0;
  while (shift < 5 && 1 << shift < a.channels) ++shift;
  divide_kernel<A><<<some(rows << shift), kThreads, 0, launch.stream>>>(a, shift);
  launch.check();
}

template <class T, int V> void spread_rows(const PoolArgs& a, const Launch& launch) {
  const int64_t packs = a.channels / V, items = a.H * a.W * packs;
  if (items < int64_t(1) << 31)
    spread_rows_kernel<T, V, int32_t>
        <<<grid(items, a.N), kThreads, 0, launch.stream>>>(a, Divider<int32_t>(packs));
  else
    spread_rows_kernel<T, V, int64_t>
        <<<grid(items, a.N), kThreads, 0, launch.stream>>>(a, Divider<int64_t>(packs));
  launch.check();
}

template <class T> void spread_block(const PoolArgs& a, bool last, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const int64_t pixels = a.H * a.W;
  if (last) {
    if (a.C % V == 0) spread_rows<T, V>(a, launch);
    else spread_rows<T, 1>(a, launch);
    return;
  }
  if (pixels % V == 0)
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
  // A multiple of every pack.
  const int64_t block = std::min(
      std::max(kSumBytes / (rows * 8), kLeastChannels) / kLeastChannels * kLeastChannels, a.C);
  const Tensor sums = empty_of(x, {rows * block}, ScalarType::Double);
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  a.means = a.sums;
  a.mean_step = int(sizeof(double) / (acc_type(x) == ScalarType::Double ? 8 : 4));
  with_element(element_of(x, "instance_avg_pool2d"), [&](auto tag) {
    using T = decltype(tag);
    for (a.c0 = 0; a.c0 < a.C; a.c0 += block) {
      a.channels = std::min(block, a.C - a.c0);
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
  launch.fetch(&total, numbered.instances.total);
  check_ids(total[1]);
  PoolArgs a = arguments(x, numbered);
  const int64_t rows = total[0];
  Tensor image = empty_of(x, {rows}, ScalarType::Long), ids = empty_of(x, {rows}, ScalarType::Long);
  Tensor counts = empty_of(x, {rows}, ScalarType::Long);
  Tensor mean = empty_of(x, {rows, a.C}, acc_type(x));
  const Tensor sums = empty_of(x, {rows, a.C}, ScalarType::Double);
  a.channels = a.C;
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  a.means = mean.mutable_data_ptr();
  with_element(element_of(x, "instance_mean_table"),
               [&](auto tag) { sum_block<decltype(tag)>(a, last, launch); });
  const int64_t pixels = numbered.map.numel();
  with_ids(ids_of(numbered.map, "instance_map"), [&](auto tag) {
    using Id = decltype(tag);
    list_kernel<Id><<<grid(pixels), kThreads, 0, launch.stream>>>(
        static_cast<const Id*>(numbered.map.const_data_ptr()), pixels, numbered.instances, a.counts,
        static_cast<int64_t*>(image.mutable_data_ptr()),
        static_cast<int64_t*>(ids.mutable_data_ptr()),
        static_cast<int64_t*>(counts.mutable_data_ptr()));
  });
  launch.check();
  return {image, ids, mean, counts};
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("instance_pool", TORCH_BOX(&instance_pool));
  m.impl("instance_means", TORCH_BOX(&instance_means));
}

}  // namespace
}  // namespace smis::cuda
