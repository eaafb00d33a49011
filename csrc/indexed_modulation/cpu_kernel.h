// Arguments of the indexed loops: gamma and beta are rows of a small table, picked by an index map.
#pragma once
#include "common/modulate_args.h"

namespace smis {

// `table` and `dtable` of each branch instead of gamma and beta.
struct IndexedArgs : ModulationArgs {
  const int32_t* index = nullptr;  // (N, H', W') of the output
  int64_t rows = 0;                // of the table
};

}  // namespace smis

// In row layout tables are (rows, 2C), in plane layout (2C, rows). Ranges in plane / row layout:
// apply (n, c) / (n, h); backward channels / channels, so that each thread owns its sums.
SMIS_DECLARE_KERNEL(indexed_planes_kernel, const IndexedArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(indexed_rows_kernel, const IndexedArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(indexed_backward_planes_kernel, const IndexedArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(indexed_backward_rows_kernel, const IndexedArgs&, int64_t begin, int64_t end)
