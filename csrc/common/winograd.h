// The maps of Winograd's F(2x2, 3x3) convolution (Lavin and Gray, CVPR 2016) on values or vectors:
// a 4x4 patch of the input and a 3x3 kernel go to 16 frequencies, 16 sums of products to 2x2 pixels.
#pragma once
#include <cstdint>

#include "isa.h"

namespace smis::SMIS_ISA {

// Each map and, for the gradients, its transpose.
template <class V> struct Winograd {
  static void input_row(const V* d, V* v, int64_t step) {  // 4 -> 4
    v[0] = d[0] - d[2 * step];
    v[step] = d[step] + d[2 * step];
    v[2 * step] = d[2 * step] - d[step];
    v[3 * step] = d[step] - d[3 * step];
  }
  static void input_row_transposed(const V* v, V* d, int64_t step) {
    d[0] = v[0];
    d[step] = v[step] - v[2 * step] + v[3 * step];
    d[2 * step] = v[step] + v[2 * step] - v[0];
    d[3 * step] = -v[3 * step];
  }
  static void input(const V* d, V* v) {
    V half[16];
    for (int i = 0; i < 4; ++i) input_row(d + 4 * i, half + 4 * i, 1);
    for (int j = 0; j < 4; ++j) input_row(half + j, v + j, 4);
  }
  static void input_transposed(const V* v, V* d) {
    V half[16];
    for (int i = 0; i < 4; ++i) input_row_transposed(v + 4 * i, half + 4 * i, 1);
    for (int j = 0; j < 4; ++j) input_row_transposed(half + j, d + j, 4);
  }
  static void weight(const V* g, V* u) {  // 3x3 -> 4x4
    V half[12];
    for (int j = 0; j < 3; ++j) {
      const V even = (g[j] + g[6 + j]) / 2, odd = g[3 + j] / 2;
      half[j] = g[j], half[3 + j] = even + odd, half[6 + j] = even - odd, half[9 + j] = g[6 + j];
    }
    for (int i = 0; i < 4; ++i) {
      const V even = (half[3 * i] + half[3 * i + 2]) / 2, odd = half[3 * i + 1] / 2;
      u[4 * i] = half[3 * i], u[4 * i + 1] = even + odd;
      u[4 * i + 2] = even - odd, u[4 * i + 3] = half[3 * i + 2];
    }
  }
  static void weight_transposed(const V* u, V* g) {
    V half[12];
    for (int i = 0; i < 4; ++i) {
      const V even = (u[4 * i + 1] + u[4 * i + 2]) / 2;
      half[3 * i] = u[4 * i] + even, half[3 * i + 2] = u[4 * i + 3] + even;
      half[3 * i + 1] = (u[4 * i + 1] - u[4 * i + 2]) / 2;
    }
    for (int j = 0; j < 3; ++j) {
      const V even = (half[3 + j] + half[6 + j]) / 2;
      g[j] = half[j] + even, g[6 + j] = half[9 + j] + even;
      g[3 + j] = (half[3 + j] - half[6 + j]) / 2;
    }
  }
  static void output(const V* m, V* w) {  // 4x4 -> 2x2
    V half[8];
    for (int j = 0; j < 4; ++j) {
      half[j] = m[j] + m[4 + j] + m[8 + j];
      half[4 + j] = m[4 + j] - m[8 + j] - m[12 + j];
    }
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = half[4 * i] + half[4 * i + 1] + half[4 * i + 2];
      w[2 * i + 1] = half[4 * i + 1] - half[4 * i + 2] - half[4 * i + 3];
    }
  }
  static void output_transposed(const V* w, V* m) {
    V half[8];
    for (int i = 0; i < 2; ++i) {
      half[4 * i] = w[2 * i], half[4 * i + 1] = w[2 * i] + w[2 * i + 1];
      half[4 * i + 2] = w[2 * i] - w[2 * i + 1], half[4 * i + 3] = -w[2 * i + 1];
    }
    for (int j = 0; j < 4; ++j) {
      m[j] = half[j], m[4 + j] = half[j] + half[4 + j];
      m[8 + j] = half[j] - half[4 + j], m[12 + j] = -half[4 + j];
    }
  }
};

}  // namespace smis::SMIS_ISA
