// Arguments of the table loops. T is float or double; windows are (rows, 9) row numbers, and row 0
// of every table stands for the outside and is zero.
#pragma once
#include "common/isa.h"

namespace smis {

struct WindowTableArgs {
  bool wide = false;  // double
  int64_t V = 0, U = 0;          // rows of hidden and of the table, row 0 included
  int64_t D = 0, C = 0, groups = 1;
  const void *hidden = nullptr;  // (V, D)
  const void *weight[2] = {nullptr, nullptr}, *bias[2] = {nullptr, nullptr};  // gamma, beta
  const int32_t* windows = nullptr;  // (U, 9)
  // Where groups have rows of hidden of their own: which of the numberings each group takes, and of each
  // the row of hidden for a number in `windows` (sources).
  const int32_t *kinds = nullptr, *ids = nullptr;
  int64_t sources = 0;
  void* table = nullptr;             // (U, 2C)
  bool one_level = false;
};

struct WindowSumArgs {
  bool wide = false, relu = false;
  int64_t V = 0, C = 0;
  const void *rows = nullptr, *bias = nullptr;  // (R, 9, C), (C) or null
  const int32_t* windows = nullptr;             // (V, 9), or (numberings, V, 9)
  // The numbering that each of the groups of channels takes, and how many rows of it are used.
  int64_t groups = 1;
  const int32_t *kinds = nullptr, *counts = nullptr;
  void* out = nullptr;  // (V, C)
};

struct WindowScatterArgs {
  bool wide = false;
  int64_t V = 0, R = 0, C = 0;
  const void* grad = nullptr;        // (V, C)
  const int32_t* windows = nullptr;  // (V, 9), or (numberings, V, 9)
  int64_t groups = 1;                // of channels
  const int32_t* kinds = nullptr;
  void* out = nullptr;  // (R, 9, C)
};

}  // namespace smis

// Column blocks: of a cache line of channels (two-level) or four register rows (one-level) of a group,
// gamma's first. Scratch: see the two functions below.
SMIS_DECLARE_KERNEL(window_table_kernel, const WindowTableArgs&, int64_t begin, int64_t end, void* scratch)
SMIS_DECLARE_KERNEL(window_table_plan, const WindowTableArgs&, int64_t* blocks, int64_t* scratch_bytes)
// Rows of the output, and channels of it.
SMIS_DECLARE_KERNEL(window_sum_kernel, const WindowSumArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(window_scatter_kernel, const WindowScatterArgs&, int64_t begin, int64_t end)
