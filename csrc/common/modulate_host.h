// What the cpu.cpp of dense and of indexed modulation share: their arguments.
#pragma once
#include "host.h"
#include "modulate_args.h"

namespace smis {

inline ModulationBranch branch(const Tensor& mean, const Tensor& rstd, double slope) {
  ModulationBranch br;
  br.mean = mean.const_data_ptr();
  br.rstd = rstd.const_data_ptr();
  br.stat_n = mean.size(0) > 1;
  br.slope = slope;
  return br;
}

inline ModulationArgs arguments(const Tensor& x, bool upsample, bool pair) {
  ModulationArgs a;
  a.element = element_of(x, "modulation");
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.x = operand(x);
  a.upsample = upsample;
  a.branches = pair ? 2 : 1;
  return a;
}

}  // namespace smis
