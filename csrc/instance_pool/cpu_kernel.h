// The instance_pool loops, one set of functions for each instruction set.
#pragma once
#include "common/modulate_args.h"

namespace smis {

// A stretch of one image's pixels, cut into runs of one id each. Pixels are counted in the image.
struct Stripe {
  int64_t n = 0, begin = 0, end = 0;
  int64_t runs = 0, ids = 0;
  const int32_t* ends = nullptr;    // [runs] one past each run
  const int32_t* labels = nullptr;  // [runs] the stripe's own number of the run's id
  const int32_t* rows = nullptr;    // [ids] the row of that id in the sums of all images
  int64_t first = 0;                // its first row among all stripes' partial sums
};

struct InstancePoolArgs {
  Element element = Element::f32;
  Operand x, out;
  int64_t c0 = 0, channels = 0;   // the channels of this block
  double* partial = nullptr;      // (rows of all stripes, channels)
  const void* means = nullptr;    // (rows of all images, channels), of the output's type
  bool stream = false;            // the output is too large to stay in cache: write past it
};

enum class Ids : int32_t { u8, i8, i16, u16, i32, i64 };

// Elements that a fill may write past the end of its buffer: one vector.
constexpr int64_t kFillBytes = 64;

}  // namespace smis

// Runs of equal ids in [begin, end): their number, and where `ends` is given one past each.
SMIS_DECLARE_KERNEL(instance_runs_kernel, Ids type, const void* ids, int64_t begin, int64_t end,
                    int32_t* ends, int64_t* count)
// Sums of one stripe, for channels [begin, end) of the block, and its means written back.
SMIS_DECLARE_KERNEL(instance_sums_planes, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_sums_rows, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_spread_planes, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_spread_rows, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
