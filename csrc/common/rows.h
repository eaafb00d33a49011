// Numbers of a table's rows: looked at before a kernel reads, or writes, there.
#pragma once
#include "common/tensor.h"

namespace smis {

// `ids` are int32 and contiguous; `rows` is how many rows the table has.
inline void check_rows(const char* name, const Tensor& ids, int64_t rows) {
  const int32_t* id = ids.const_data_ptr<int32_t>();
  const int64_t count = ids.numel();
  // One comparison: as unsigned a number below 0 lies beyond every table.
  const uint32_t end = uint32_t(std::min<int64_t>(rows, int64_t(1) << 31));
  uint32_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond |= uint32_t(uint32_t(id[i]) >= end);
  if (beyond == 0) return;
  const int32_t bad =
      *std::find_if(id, id + count, [end](int32_t row) { return uint32_t(row) >= end; });
  refuse(name, ": expected rows 0..", rows - 1, ", got ", bad,
         "; give each pixel or tap a row that the table has");
}

}  // namespace smis
