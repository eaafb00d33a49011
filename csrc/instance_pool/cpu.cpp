// instance_pool and instance_means on the CPU. Work is cut into stripes by the shape alone, each
// with bins of its own that are merged in order: the result does not depend on the threads.
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/modulate_host.h"
#include "instance_pool/cpu_kernel.h"

namespace smis {
namespace {

constexpr int64_t kStripe = 1 << 16;         // pixels of a stripe
constexpr int64_t kStripeValues = 1 << 18;   // values of a stripe where channels are dense
constexpr int64_t kBinBytes = 8 << 20;       // partial sums alive at a time
constexpr int64_t kMaxId = 0x7fffffff;

Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return vector_like(like, sizes, type);
}

// Ids to numbers from 0, in order of first appearance: open addressing that grows.
class Numbering {
 public:
  explicit Numbering(const Tensor& like) : like_(like) { resize(256); }
  int32_t operator()(uint32_t id) {
    if (2 * (count_ + 1) > capacity_) grow();
    uint64_t* slot = find(id);
    if (*slot == 0) *slot = uint64_t(id) << 32 | uint64_t(++count_);
    return int32_t(*slot & 0xffffffffu) - 1;
  }
  int64_t count() const { return count_; }
  // The ids in order of their numbers.
  template <class F> void each(F&& f) const {
    for (int64_t i = 0; i < capacity_; ++i)
      if (slots_[i] != 0) f(int32_t(slots_[i] & 0xffffffffu) - 1, uint32_t(slots_[i] >> 32));
  }

 private:
  uint64_t* find(uint32_t id) {
    uint64_t i = id * 0x9E3779B97F4A7C15ull >> shift_;
    while (slots_[i] != 0 && uint32_t(slots_[i] >> 32) != id) i = (i + 1) & uint64_t(capacity_ - 1);
    return slots_ + i;
  }
  void resize(int64_t capacity) {
    capacity_ = capacity;
    for (shift_ = 64; capacity > 1; capacity /= 2) --shift_;
    memory_ = empty_of(like_, {capacity_}, ScalarType::Long);
    slots_ = static_cast<uint64_t*>(memory_.mutable_data_ptr());
    std::fill(slots_, slots_ + capacity_, uint64_t(0));
  }
  void grow() {
    const Tensor old = memory_;
    const auto* kept = static_cast<const uint64_t*>(old.const_data_ptr());
    const int64_t size = capacity_;
    resize(4 * size);
    for (int64_t i = 0; i < size; ++i)
      if (kept[i] != 0) *find(uint32_t(kept[i] >> 32)) = kept[i];
  }

  Tensor like_, memory_;
  uint64_t* slots_ = nullptr;
  int64_t capacity_ = 0, count_ = 0;
  int shift_ = 64;
};

Ids ids_of(const Tensor& map) {
  switch (map.scalar_type()) {
    case ScalarType::Byte: return Ids::u8;
    case ScalarType::Char: return Ids::i8;
    case ScalarType::Short: return Ids::i16;
    case ScalarType::UInt16: return Ids::u16;
    case ScalarType::Int: return Ids::i32;
    case ScalarType::Long: return Ids::i64;
    default: STD_TORCH_CHECK(false, "instance_map must hold integers");
  }
}

int64_t id_at(Ids type, const void* ids, int64_t p) {
  switch (type) {
    case Ids::u8: return static_cast<const uint8_t*>(ids)[p];
    case Ids::i8: return static_cast<const int8_t*>(ids)[p];
    case Ids::i16: return static_cast<const int16_t*>(ids)[p];
    case Ids::u16: return static_cast<const uint16_t*>(ids)[p];
    case Ids::i32: return static_cast<const int32_t*>(ids)[p];
    default: return static_cast<const int64_t*>(ids)[p];
  }
}

// The ids of a batch: stripes of runs, and one row for each id of each image.
struct Segments {
  std::vector<Stripe> stripes;
  std::vector<Tensor> memory;    // of each stripe: ends and labels of its runs, ids and counts
  std::vector<int64_t> images;   // first row of each image, and the number of all rows
  Tensor ids, counts;            // [rows] int64
  int64_t partial_rows = 0;

  int64_t rows() const { return images.back(); }
};

// One stripe's runs, numbered by the stripe itself: `own` gets (id, pixels) of each number. An id out
// of range goes to `unknown`, which is left alone otherwise.
Tensor cut(Stripe& s, Ids type, const void* ids, const Tensor& like, Tensor& own,
           std::atomic<int64_t>& unknown) {
  instance_runs_kernel_best()(type, ids, s.begin, s.end, nullptr, &s.runs);
  Tensor held = empty_of(like, {2, s.runs}, ScalarType::Int);
  auto* ends = static_cast<int32_t*>(held.mutable_data_ptr());
  int32_t* labels = ends + s.runs;
  instance_runs_kernel_best()(type, ids, s.begin, s.end, ends, &s.runs);
  Numbering number(like);
  int64_t p = s.begin;
  for (int64_t r = 0; r < s.runs; ++r) {
    const int64_t id = id_at(type, ids, p);
    if (id < 0 || id > kMaxId) unknown = id;
    labels[r] = number(uint32_t(id));
    p = ends[r];
  }
  s.ends = ends;
  s.labels = labels;
  s.ids = number.count();
  own = empty_of(like, {2, s.ids}, ScalarType::Long);
  auto* numbers = static_cast<int64_t*>(own.mutable_data_ptr());
  std::fill(numbers + s.ids, numbers + 2 * s.ids, int64_t(0));
  number.each([&](int32_t l, uint32_t id) { numbers[l] = int64_t(id); });
  p = s.begin;
  for (int64_t r = 0; r < s.runs; ++r) {
    numbers[s.ids + labels[r]] += ends[r] - p;
    p = ends[r];
  }
  return held;
}

Segments segments(const Tensor& map, int64_t channels, bool last) {
  const int64_t N = map.size(0), P = map.size(1) * map.size(2);
  STD_TORCH_CHECK(P <= kMaxId, "instance_map: expected fewer than 2^31 pixels in an image");
  const Ids type = ids_of(map);
  const Tensor dense = torch::stable::contiguous(map);
  const auto* base = static_cast<const unsigned char*>(dense.const_data_ptr());
  const int64_t bytes = int64_t(dense.element_size()) * P;
  const int64_t length = last ? std::clamp<int64_t>(kStripeValues / channels, 1024, kStripe) : kStripe;
  const int64_t parts = (P + length - 1) / length;
  Segments g;
  g.stripes.resize(size_t(N * parts));
  g.memory.resize(size_t(N * parts));
  std::vector<Tensor> own(size_t(N * parts)), rows(size_t(N * parts));
  std::atomic<int64_t> unknown{0};
  parallel(N * parts, kGrain / std::min(P, length), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      Stripe& s = g.stripes[size_t(i)];
      s.n = i / parts, s.begin = i % parts * length, s.end = std::min(P, s.begin + length);
      g.memory[size_t(i)] = cut(s, type, base + s.n * bytes, map, own[size_t(i)], unknown);
    }
  });
  if (unknown != 0)
    throw std::runtime_error("instance_map: expected ids 0.." + std::to_string(kMaxId) + ", got " +
                             std::to_string(unknown.load()) + "; renumber the instances first");
  std::vector<Tensor> image_ids(static_cast<size_t>(N));
  g.images.assign(size_t(N) + 1, 0);
  parallel(N, 1, [&](int64_t b, int64_t e) {
    for (int64_t n = b; n < e; ++n) {
      Numbering number(map);
      for (int64_t i = n * parts; i < (n + 1) * parts; ++i) {
        Stripe& s = g.stripes[size_t(i)];
        rows[size_t(i)] = empty_of(map, {s.ids}, ScalarType::Int);
        auto* row = static_cast<int32_t*>(rows[size_t(i)].mutable_data_ptr());
        const auto* numbers = static_cast<const int64_t*>(own[size_t(i)].const_data_ptr());
        for (int64_t l = 0; l < s.ids; ++l) row[l] = number(uint32_t(numbers[l]));
        s.rows = row;
      }
      g.images[size_t(n) + 1] = number.count();
      image_ids[size_t(n)] = empty_of(map, {number.count()}, ScalarType::Long);
      auto* ids = static_cast<int64_t*>(image_ids[size_t(n)].mutable_data_ptr());
      number.each([&](int32_t row, uint32_t id) { ids[row] = int64_t(id); });
    }
  });
  std::partial_sum(g.images.begin(), g.images.end(), g.images.begin());
  g.ids = empty_of(map, {g.rows()}, ScalarType::Long);
  g.counts = empty_of(map, {g.rows()}, ScalarType::Long);
  auto* ids = static_cast<int64_t*>(g.ids.mutable_data_ptr());
  auto* counts = static_cast<int64_t*>(g.counts.mutable_data_ptr());
  std::fill(counts, counts + g.rows(), int64_t(0));
  for (int64_t n = 0; n < N; ++n) {
    const auto* found = static_cast<const int64_t*>(image_ids[size_t(n)].const_data_ptr());
    std::copy(found, found + g.images[size_t(n) + 1] - g.images[size_t(n)], ids + g.images[size_t(n)]);
  }
  for (size_t i = 0; i < g.stripes.size(); ++i) {
    Stripe& s = g.stripes[i];
    s.first = g.partial_rows;
    g.partial_rows += s.ids;
    auto* row = static_cast<int32_t*>(rows[i].mutable_data_ptr());
    const auto* pixels = static_cast<const int64_t*>(own[i].const_data_ptr()) + s.ids;
    for (int64_t l = 0; l < s.ids; ++l) {
      row[l] += int32_t(g.images[size_t(s.n)]);
      counts[row[l]] += pixels[l];
    }
    g.memory.push_back(rows[i]);
  }
  return g;
}

// Means (rows, channels) of the block, from the stripes' sums in their order.
void reduce(const Segments& g, const InstancePoolArgs& a, double* sums) {
  const auto* counts = static_cast<const int64_t*>(g.counts.const_data_ptr());
  const int64_t stripes = int64_t(g.stripes.size()), images = int64_t(g.images.size()) - 1;
  const int64_t parts = stripes / std::max<int64_t>(images, 1);
  parallel(images, kGrain / std::max<int64_t>(g.partial_rows * a.channels, 1),
           [&](int64_t b, int64_t e) {
    for (int64_t n = b; n < e; ++n) {
      const int64_t begin = g.images[size_t(n)], end = g.images[size_t(n) + 1], C = a.channels;
      std::fill(sums + begin * C, sums + end * C, 0.0);
      for (int64_t i = n * parts; i < (n + 1) * parts; ++i) {
        const Stripe& s = g.stripes[size_t(i)];
        for (int64_t l = 0; l < s.ids; ++l)
          for (int64_t c = 0; c < C; ++c)
            sums[s.rows[l] * C + c] += a.partial[(s.first + l) * C + c];
      }
      for (int64_t k = begin; k < end; ++k)
        for (int64_t c = 0; c < C; ++c) sums[k * C + c] /= double(counts[k]);
    }
  });
}

// Calls use(block, means) for the means (rows, channels) in fp64 of each block of channels.
template <class F>
void each_block(const Segments& g, InstancePoolArgs a, int64_t channels, bool last, F&& use) {
  const int64_t least = last ? 16 : 1;
  const int64_t fits = kBinBytes / (8 * std::max<int64_t>(g.partial_rows + g.rows(), 1));
  const int64_t block = std::min(std::max(fits, least), channels);
  const Tensor like = g.ids;
  Tensor partial = empty_of(like, {g.partial_rows, block}, ScalarType::Double);
  a.partial = static_cast<double*>(partial.mutable_data_ptr());
  const int64_t stripes = int64_t(g.stripes.size());
  for (a.c0 = 0; a.c0 < channels; a.c0 += block) {
    a.channels = std::min(block, channels - a.c0);
    if (last) {
      parallel(stripes, 1, [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) instance_sums_rows_best()(a, g.stripes[size_t(i)], 0, a.channels);
      });
    } else {
      parallel(stripes * a.channels, 1, [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i)
          instance_sums_planes_best()(a, g.stripes[size_t(i / a.channels)], i % a.channels,
                                      i % a.channels + 1);
      });
    }
    Tensor sums = empty_of(like, {g.rows(), a.channels}, ScalarType::Double);
    reduce(g, a, static_cast<double*>(sums.mutable_data_ptr()));
    use(a, sums);
  }
}

Tensor instance_pool(const Tensor& input, const Tensor& instance_map) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  const int64_t C = x.size(1);
  Tensor out = empty_nchw(x.size(0), C, x.size(2), x.size(3), last, x);
  if (out.numel() == 0) return out;
  const Segments g = segments(instance_map, C, last);
  InstancePoolArgs args;
  args.element = element_of(x, "instance_avg_pool2d");
  args.x = operand(x);
  args.out = operand(out);
  args.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  each_block(g, args, C, last, [&](InstancePoolArgs a, const Tensor& sums) {
    const Tensor means = torch::stable::to(sums, x.scalar_type());
    a.means = means.const_data_ptr();
    const int64_t stripes = int64_t(g.stripes.size()), each = last ? 1 : a.channels;
    parallel(stripes * each, 1, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const Stripe& s = g.stripes[size_t(i / each)];
        if (last) instance_spread_rows_best()(a, s, 0, a.channels);
        else instance_spread_planes_best()(a, s, i % each, i % each + 1);
      }
    });
  });
  return out;
}

// (image, id, mean, count) of every instance, by image.
std::tuple<Tensor, Tensor, Tensor, Tensor> instance_means(const Tensor& input,
                                                          const Tensor& instance_map) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  const int64_t C = x.size(1);
  const Segments g = segments(instance_map, C, last);
  Tensor image = empty_of(x, {g.rows()}, ScalarType::Long);
  Tensor mean = empty_of(x, {g.rows(), C}, acc_type(x));
  auto* n = static_cast<int64_t*>(image.mutable_data_ptr());
  for (size_t i = 0; i + 1 < g.images.size(); ++i)
    std::fill(n + g.images[i], n + g.images[i + 1], int64_t(i));
  InstancePoolArgs args;
  args.element = element_of(x, "instance_mean_table");
  args.x = operand(x);
  each_block(g, args, C, last, [&](const InstancePoolArgs& a, const Tensor& sums) {
    Tensor columns = torch::stable::narrow(mean, 1, a.c0, a.channels);
    torch::stable::copy_(columns, sums);
  });
  return {image, g.ids, mean, g.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("instance_pool", TORCH_BOX(&instance_pool));
  m.impl("instance_means", TORCH_BOX(&instance_means));
}

}  // namespace smis
