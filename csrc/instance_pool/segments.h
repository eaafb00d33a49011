// The ids of a batch: stripes, cut by the shape alone, their runs, a row for each id of each image.
#pragma once
#include <atomic>

#include "instance_pool/cpu_kernel.h"
#include "instance_pool/max_id.h"
#include "instance_pool/numbering.h"

namespace smis {
namespace {

constexpr int64_t kStripe = 1 << 15;  // pixels of a stripe

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
  with_ids(type, [&](auto tag) {
    const auto* id = static_cast<const decltype(tag)*>(ids);
    int64_t p = s.begin;
    for (int64_t r = 0; r < s.runs; ++r) {
      if (uint64_t(id[p]) > uint64_t(kMaxId)) unknown = int64_t(id[p]);
      labels[r] = number(int32_t(id[p]), int32_t(scratch[r] - p));
      p = scratch[r];
    }
  });
  s.ids = number.count();
  const Tensor held = empty_of(like, {2 * (s.runs + s.ids)}, ScalarType::Int);
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
  check_plane("instance_map", map.size(1), map.size(2));
  const Ids type = ids_of(map, "instance_map");
  const Tensor dense = torch::stable::contiguous(map);
  const auto* base = static_cast<const unsigned char*>(dense.const_data_ptr());
  const int64_t bytes = int64_t(dense.element_size()) * P, parts = (P + kStripe - 1) / kStripe;
  Segments g;
  g.stripes.resize(size_t(N * parts));
  g.held.resize(size_t(N * parts));
  g.found.resize(size_t(N));
  std::atomic<int64_t> unknown{0};
  parallel(N * parts, grain(length), [&](int64_t b, int64_t e) {
    Tensor scratch = empty_of(map, {2 * length + kSpareEnds}, ScalarType::Int);
    auto* runs = static_cast<int32_t*>(scratch.mutable_data_ptr());
    Numbering number(map);
    for (int64_t i = b; i < e; ++i) {
      Stripe& s = g.stripes[size_t(i)];
      s.n = i / parts, s.begin = i % parts * kStripe, s.end = std::min(P, s.begin + kStripe);
      g.held[size_t(i)] = cut(s, type, base + s.n * bytes, map, runs, number, unknown);
    }
  });
  check_ids(unknown);
  for (Stripe& s : g.stripes) {
    s.first = g.partial_rows;
    g.partial_rows += s.ids;
  }
  g.rows = empty_of(map, {g.partial_rows}, ScalarType::Int);
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
  found = empty_of(g.rows, {2, number.count()}, ScalarType::Int);
  number.list(static_cast<int32_t*>(found.mutable_data_ptr()));
}

void place_images(Segments& g) {
  g.images.assign(1, 0);
  for (const Tensor& found : g.found) g.images.push_back(g.images.back() + found.size(1));
  for (Stripe& s : g.stripes) s.image = g.images[size_t(s.n)];
}

}  // namespace
}  // namespace smis
