// How much scratch each kernel needs: elements of the sums' type, in the order it lays them out.
#pragma once
#include "spatially_varying_conv/cpu_kernel.h"

namespace smis {

// Input rows and columns behind `rows` output rows, padding included.
inline int64_t patch_rows(const VaryingConvArgs& a, int64_t rows) {
  return (rows - 1) * a.stride + a.reach() + 1;
}
inline int64_t patch_pitch(const VaryingConvArgs& a) {
  const int64_t read = (a.OW - 1) * a.stride + a.reach() + 1, whole = a.W + a.padding;
  return read > whole ? read : whole;
}
inline int64_t padded_rows(const VaryingConvArgs& a) {
  const int64_t read = patch_rows(a, a.OH), whole = a.H + a.padding;
  return read > whole ? read : whole;
}
inline int64_t planes_scratch(const VaryingConvArgs& a) {
  return patch_rows(a, a.rows()) * patch_pitch(a) + (a.taps() + 2) * a.rows() * a.OW;
}
inline int64_t grad_input_planes_scratch(const VaryingConvArgs& a) {
  return padded_rows(a) * patch_pitch(a) + 2 * a.rows() * a.OW;
}
inline int64_t rows_scratch(const VaryingConvArgs& a) {
  return (a.taps() + 4) * a.C + a.G * a.taps();
}
inline int64_t grad_input_rows_scratch(const VaryingConvArgs& a) {
  return rows_scratch(a) + a.band() * a.W * a.C;
}

}  // namespace smis
