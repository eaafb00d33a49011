// instance_pool and instance_means on the CPU. Each stripe has bins of its own, which are merged in
// order: the result does not depend on the threads.
#include "instance_pool/segments.h"

namespace smis {
namespace {

constexpr int64_t kGroup = 8;            // planes that a thread follows at a time
constexpr int64_t kRowGroup = 256;       // channels of a row that it does
constexpr int64_t kMerge = 1 << 14;      // partial sums that a thread merges
constexpr int64_t kBinBytes = 32 << 20;  // partial sums alive at a time

// run(i) for i in [0, tasks), each by the next thread that is free; `values` are handled in all.
template <class F> void each_task(int64_t tasks, int64_t values, const F& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), values / kGrain + 1);
  parallel(std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

using Loop = void (*)(const InstancePoolArgs&, const Stripe&, int64_t, int64_t);

// Calls run(a, stripe, begin, end) for groups of channels of the block in every stripe, and before
// that first(i) for i in [0, others).
template <class F>
void each_stripe(const Segments& g, const InstancePoolArgs& a, Loop planes, Loop rows,
                 int64_t others, F&& first) {
  const int64_t C = a.channels;
  // Few channels of a row, as many as are followed at a time, go the way of planes.
  const bool wide = a.rows && !(C <= 4 || C == kGroup);
  const Loop run = wide ? rows : planes;
  const int64_t size = wide ? kRowGroup : kGroup, groups = (C + size - 1) / size;
  each_task(others + int64_t(g.stripes.size()) * groups, g.count() * a.pixels * C, [&](int64_t t) {
    if (t < others) return first(t);
    const int64_t i = t - others, c = i % groups * size;
    run(a, g.stripes[size_t(i / groups)], c, std::min(c + size, C));
  });
}

// Means of the block's channels, of the type that `a` names.
void merge(const Segments& g, const InstancePoolArgs& a, double* sums) {
  const int64_t values = g.partial_rows * a.partial_row, cuts = values / g.count() / kMerge + 1;
  each_task(g.count() * cuts, values, [&](int64_t t) {
    const int64_t n = t / cuts, first = g.images[size_t(n)], rows = g.images[size_t(n) + 1] - first;
    const Merge m{g.stripes.data() + n * g.parts(), g.parts(), g.found_in(n) + rows,
                  sums + first * a.partial_row};
    instance_merge_best()(a, m, t % cuts * rows / cuts, (t % cuts + 1) * rows / cuts);
  });
}

// For each block of channels whose sums are held at a time: sets where its means go by place(a),
// fills them in, and calls use(a).
template <class P, class F>
void each_block(Segments& g, InstancePoolArgs a, int64_t channels, P&& place, F&& use) {
  const int64_t fits = kBinBytes / (8 * std::max<int64_t>(g.partial_rows, 1));
  const int64_t least = a.rows ? 4 * kGroup : kGroup;
  const int64_t block = std::min(std::max(fits / kGroup * kGroup, least), channels);
  a.partial_row = block % 4 == 3 ? block + 1 : block;
  Tensor partial = empty_of(g.rows, {g.partial_rows, a.partial_row}, ScalarType::Double), sums;
  a.partial = static_cast<double*>(partial.mutable_data_ptr());
  for (a.c0 = 0; a.c0 < channels; a.c0 += block) {
    a.channels = std::min(block, channels - a.c0);
    // Rows are numbered while other threads sum.
    each_stripe(g, a, instance_sums_planes_best(), instance_sums_rows_best(),
                a.c0 == 0 ? g.count() : 0, [&](int64_t n) { number_rows(g, n); });
    if (a.c0 == 0) {
      place_images(g);
      sums = empty_of(g.rows, {g.images.back(), a.partial_row}, ScalarType::Double);
    }
    place(a);
    merge(g, a, static_cast<double*>(sums.mutable_data_ptr()));
    use(a);
  }
}

InstancePoolArgs arguments(const Tensor& x, const char* op, bool last) {
  InstancePoolArgs a;
  a.element = a.mean_element = element_of(x, op);
  a.x = operand(x);
  a.rows = last;
  a.pixels = x.size(2) * x.size(3);
  return a;
}

Tensor instance_pool(const Tensor& input, const Tensor& instance_map) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  Tensor out = empty_nchw(x.size(0), x.size(1), x.size(2), x.size(3), last, x);
  if (out.numel() == 0) return out;
  Segments g = segments(instance_map);
  InstancePoolArgs args = arguments(x, "instance_avg_pool2d", last);
  args.out = operand(out);
  args.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  Tensor means;
  each_block(
      g, args, x.size(1),
      [&](InstancePoolArgs& a) {
        means = empty_of(x, {g.images.back(), a.channels}, x.scalar_type());
        a.means = means.mutable_data_ptr();
        a.mean_row = a.channels;
      },
      [&](const InstancePoolArgs& a) {
        each_stripe(g, a, instance_spread_planes_best(), instance_spread_rows_best(), 0,
                    [](int64_t) {});
      });
  return out;
}

// (image, id, mean, count) of every instance, by image.
std::tuple<Tensor, Tensor, Tensor, Tensor> instance_means(const Tensor& input,
                                                          const Tensor& instance_map) {
  const bool last = channels_last(input);
  const Tensor x = laid_out(input, last);
  Segments g = segments(instance_map);
  Tensor mean;
  each_block(
      g, arguments(x, "instance_mean_table", last), x.size(1),
      [&](InstancePoolArgs& a) {
        if (a.c0 == 0) mean = empty_of(x, {g.images.back(), x.size(1)}, acc_type(x));
        a.means = static_cast<unsigned char*>(mean.mutable_data_ptr()) +
                  a.c0 * int64_t(mean.element_size());
        a.mean_row = x.size(1);
        a.mean_element = element_of(mean, "instance_mean_table");
      },
      [](const InstancePoolArgs&) {});
  Tensor columns[3];  // image, id, count
  int64_t* to[3];
  for (int i = 0; i < 3; ++i) {
    columns[i] = empty_of(x, {g.images.back()}, ScalarType::Long);
    to[i] = static_cast<int64_t*>(columns[i].mutable_data_ptr());
  }
  for (int64_t n = 0; n < g.count(); ++n) {
    const int64_t first = g.images[size_t(n)], count = g.images[size_t(n) + 1] - first;
    const int32_t* found = g.found_in(n);
    std::fill_n(to[0] + first, count, n);
    std::copy_n(found, count, to[1] + first);
    std::copy_n(found + count, count, to[2] + first);
  }
  return {columns[0], columns[1], mean, columns[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("instance_pool", TORCH_BOX(&instance_pool));
  m.impl("instance_means", TORCH_BOX(&instance_means));
}

}  // namespace smis
