// The instance_pool loops, one set of functions for each instruction set.
#pragma once
#include "common/ids.h"
#include "common/operand.h"

namespace smis {

// A stretch of one image's pixels, cut into runs of one id each. Pixels are counted in the image.
struct Stripe {
  int64_t n = 0, begin = 0, end = 0;
  int64_t runs = 0, ids = 0;
  const int32_t* ends = nullptr;    // [runs] one past each run
  const int32_t* labels = nullptr;  // [runs] the stripe's own number of the run's id
  const int32_t* own = nullptr;     // [2, ids] the id and the pixels of each number
  int32_t* rows = nullptr;          // [ids] the row of each number among its image's
  int64_t low = 0, high = 0;        // between which its rows lie
  int64_t image = 0;                // the first row of its image among all images' means
  int64_t first = 0;                // its first row among all stripes' partial sums
};

struct InstancePoolArgs {
  Element element = Element::f32, mean_element = Element::f32;
  Operand x, out;
  int64_t pixels = 0;             // of an image
  int64_t c0 = 0, channels = 0;   // the channels of this block
  double* partial = nullptr;      // (rows of all stripes, partial_row)
  int64_t partial_row = 0;        // channels; one more where the last three go together
  void* means = nullptr;          // (rows of all images, channels), of type mean_element
  int64_t mean_row = 0;           // stride of its rows
  bool rows = false;              // channels are dense, not planes
  bool stream = false;            // the output is too large to stay in cache: write past it
};

// One image's stripes, and what becomes of their sums.
struct Merge {
  const Stripe* stripes = nullptr;
  int64_t count = 0;
  const int32_t* pixels = nullptr;  // [rows]
  double* sums = nullptr;           // (rows, partial_row), scratch
};

// Ends of runs that the search may write past the last one.
constexpr int64_t kSpareEnds = 16;

}  // namespace smis

// Runs of equal ids in [begin, end): one past each, and their number.
SMIS_DECLARE_KERNEL(instance_runs_kernel, Ids type, const void* ids, int64_t begin, int64_t end,
                    int32_t* ends, int64_t* count)
// Sums of one stripe for channels [begin, end) of the block, and its means written back; planes are
// dense in one pair, channels in the other.
SMIS_DECLARE_KERNEL(instance_sums_planes, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_sums_rows, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
// Means of one image's rows [begin, end), from the stripes' sums in their order.
SMIS_DECLARE_KERNEL(instance_merge, const InstancePoolArgs&, const Merge&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_spread_planes, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
SMIS_DECLARE_KERNEL(instance_spread_rows, const InstancePoolArgs&, const Stripe&, int64_t begin,
                    int64_t end)
