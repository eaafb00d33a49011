// The ids of a batch: stripes, cut by the shape alone, their runs, a row for each id of each image.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>

#include "instance_pool/cpu_kernel.h"
#include "instance_pool/numbering.h"

namespace smis {
namespace {

constexpr int64_t kStripe = 1 << 15;  // pixels of a stripe
constexpr int64_t kMaxId = 0x7fffffff;

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

template <class F> void with_ids(Ids type, const void* ids, F&& f) {
  switch (type) {
    case Ids::u8: return f(static_cast<const uint8_t*>(ids));
    case Ids::i8: return f(static_cast<const int8_t*>(ids));
    case Ids::i16: return f(static_cast<const int16_t*>(ids));
    case Ids::u16: return f(static_cast<const uint16_t*>(ids));
    case Ids::i32: return f(static_cast<const int32_t*>(ids));
    case Ids::i64: return f(static_cast<const int64_t*>(ids));
  }
}

// The ids of a batch: stripes of runs, and one row for each id of each image.
struct Segments {
  std::vector<Stripe> stripes;
  std::vector<Tensor> held;     // of each stripe: its runs, and ids and pixels of its numbers
  Tensor rows;                  // of all stripes
  std::vector<Tensor> found;    // of each image: ids and pixels of its rows
  std::vector<int64_t> images;  // first row of each image, and the number of all rows
  int64_t partial_rows = 0;

  int64_t count() const { return int64_t(found.size()); }
  int64_t parts() const { return int64_t(stripes.size()) / count(); }
  const int32_t* found_in(int64_t n) const {
    return static_cast<const int32_t*>(found[size_t(n)].const_data_ptr());
  }
};

// One stripe's runs, numbered by the stripe itself. An id out of range goes to `unknown`.
Tensor cut(Stripe& s, Ids type, const void* ids, const Tensor& like, int32_t* scratch,
           Numbering& number, std::atomic<int64_t>& unknown) {
  instance_runs_kernel_best()(type, ids, s.begin, s.end, scratch, &s.runs);
  int32_t* labels = scratch + s.runs;
  number.clear();
  with_ids(type, ids, [&](const auto* id) {
    int64_t p = s.begin;
    for (int64_t r = 0; r < s.runs; ++r) {
      if (uint64_t(id[p]) > uint64_t(kMaxId)) unknown = int64_t(id[p]);
      labels[r] = number(int32_t(id[p]), int32_t(scratch[r] - p));
      p = scratch[r];
    }
  });
  s.ids = number.count();
  const Tensor held = vector_like(like, {2 * (s.runs + s.ids)}, ScalarType::Int);
  auto* kept = static_cast<int32_t*>(held.mutable_data_ptr());
  std::copy(scratch, scratch + 2 * s.runs, kept);
  number.list(kept + 2 * s.runs);
  s.ends = kept;
  s.labels = kept + s.runs;
  s.own = kept + 2 * s.runs;
  return held;
}

Segments segments(const Tensor& map) {
  const int64_t N = map.size(0), P = map.size(1) * map.size(2), length = std::min(P, kStripe);
  STD_TORCH_CHECK(P <= kMaxId, "instance_map: expected fewer than 2^31 pixels in an image");
  const Ids type = ids_of(map);
  const Tensor dense = torch::stable::contiguous(map);
  const auto* base = static_cast<const unsigned char*>(dense.const_data_ptr());
  const int64_t bytes = int64_t(dense.element_size()) * P, parts = (P + kStripe - 1) / kStripe;
  Segments g;
  g.stripes.resize(size_t(N * parts));
  g.held.resize(size_t(N * parts));
  g.found.resize(size_t(N));
  std::atomic<int64_t> unknown{0};
  parallel(N * parts, grain(length), [&](int64_t b, int64_t e) {
    Tensor scratch = vector_like(map, {2 * length + kSpareEnds}, ScalarType::Int);
    auto* runs = static_cast<int32_t*>(scratch.mutable_data_ptr());
    Numbering number(map);
    for (int64_t i = b; i < e; ++i) {
      Stripe& s = g.stripes[size_t(i)];
      s.n = i / parts, s.begin = i % parts * kStripe, s.end = std::min(P, s.begin + kStripe);
      g.held[size_t(i)] = cut(s, type, base + s.n * bytes, map, runs, number, unknown);
    }
  });
  if (unknown != 0)
    throw std::runtime_error("instance_map: expected ids 0.." + std::to_string(kMaxId) + ", got " +
                             std::to_string(unknown.load()) + "; renumber the instances first");
  for (Stripe& s : g.stripes) {
    s.first = g.partial_rows;
    g.partial_rows += s.ids;
  }
  g.rows = vector_like(map, {g.partial_rows}, ScalarType::Int);
  auto* rows = static_cast<int32_t*>(g.rows.mutable_data_ptr());
  for (Stripe& s : g.stripes) s.rows = rows + s.first;
  return g;
}

// The numbers of one image's stripes to rows of the image.
void number_rows(Segments& g, int64_t n) {
  const auto begin = g.stripes.begin() + n * g.parts(), end = begin + g.parts();
  Numbering number(g.rows, (end - 1)->first + (end - 1)->ids - begin->first);
  for (auto s = begin; s != end; ++s) {
    s->low = number.count();
    for (int64_t l = 0; l < s->ids; ++l) {
      s->rows[l] = number(s->own[l], s->own[s->ids + l]);
      s->low = std::min<int64_t>(s->low, s->rows[l]);
    }
    s->high = number.count();
  }
  Tensor& found = g.found[size_t(n)];
  found = vector_like(g.rows, {2, number.count()}, ScalarType::Int);
  number.list(static_cast<int32_t*>(found.mutable_data_ptr()));
}

void place_images(Segments& g) {
  g.images.assign(1, 0);
  for (const Tensor& found : g.found) g.images.push_back(g.images.back() + found.size(1));
  for (Stripe& s : g.stripes) s.image = g.images[size_t(s.n)];
}

}  // namespace
}  // namespace smis
