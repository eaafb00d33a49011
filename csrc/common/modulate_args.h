// Arguments that dense and indexed modulation share.
#pragma once
#include "operand.h"

namespace smis {

// One output of the pair: statistics (N or 1, C), gamma and beta (dense, or rows [gamma | beta] of a
// table of sums' type), and the output itself.
struct ModulationBranch {
  const void *mean = nullptr, *rstd = nullptr;
  int64_t stat_n = 0;  // 0 where one row of statistics serves the batch
  Operand gamma, beta, out;
  const void* table = nullptr;
  Operand grad, dgamma, dbeta;  // backward only; `out` is then the saved output
  void* dtable = nullptr;
  double slope = 1;
};

struct ModulationArgs {
  Element element = Element::f32;
  int64_t N = 0, C = 0, H = 0, W = 0;
  bool upsample = false;
  int branches = 1;
  ModulationBranch branch[2];
  Operand x, dx;
  bool stream = false;  // the output is too large to stay in cache: write past it
  // Backward, plane layout: the two sums (N, C), sums_stride apart; row layout: partial sums
  // (N, chunks of `chunk` source rows, 2, C).
  void* sums = nullptr;
  int64_t sums_stride = 0, chunk = 0;
};

}  // namespace smis
