// The maps of Winograd's convolutions (Lavin and Gray, CVPR 2016) on vectors: a patch of side^2 inputs and
// a kernel go to as many frequencies, their products to m x m pixels. F(2x2, 3x3), F(4x4, 3x3), and of
// kernels of two taps F(3x3, 2x2).
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "isa.h"

namespace smis::SMIS_ISA {

template <class V, int m = 2> struct Winograd;

// Each map and, for the gradients, its transpose.
template <class V> struct Winograd<V, 2> {
  static constexpr int side = 4;
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

// Interpolation at the points of F(2x2, 3x3): 0, +-1 and infinity.
template <class V> struct Winograd<V, 3> {
  static constexpr int side = 4;
  static void input(const V* d, V* v) { Winograd<V, 2>::input(d, v); }
  static void weight_row(const V* g, int64_t from, V* u, int64_t to) {  // 2 -> 4
    const V even = g[0] / 2, odd = g[from] / 2;
    u[0] = g[0], u[to] = even + odd, u[2 * to] = even - odd, u[3 * to] = g[from];
  }
  static void output_row(const V* m, int64_t from, V* w, int64_t to) {  // 4 -> 3
    const V even = m[from] + m[2 * from];
    w[0] = m[0] + even, w[to] = m[from] - m[2 * from], w[2 * to] = even - m[3 * from];
  }
  static void weight(const V* g, V* u) {  // 2x2 -> 4x4
    V half[8];
    for (int j = 0; j < 2; ++j) weight_row(g + j, 2, half + j, 2);
    for (int i = 0; i < 4; ++i) weight_row(half + 2 * i, 1, u + 4 * i, 1);
  }
  static void output(const V* m, V* w) {  // 4x4 -> 3x3
    V half[12];
    for (int j = 0; j < 4; ++j) output_row(m + j, 4, half + j, 4);
    for (int i = 0; i < 3; ++i) output_row(half + 4 * i, 1, w + 3 * i, 1);
  }
};

// Interpolation at 0, +-a, +-b and infinity with a = sqrt(1/2), b = 2a: ab = 1 keeps most factors
// powers of two, and at 0, +-1, +-2 the error is twice as large.
template <class V> struct Winograd<V, 4> {
  static constexpr int side = 6;
  using T = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
  static constexpr T a = T(0.70710678118654752440), b = 2 * a, third = T(1) / 3;

  static void input_row(const V* d, V* v, int64_t step) {  // 6 -> 6
    const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    v[0] = d[0] - T(2.5) * d2 + d4;
    const V even_a = d4 - 2 * d2, odd_a = d3 - 2 * d1;
    const V even_b = d4 - T(0.5) * d2, odd_b = d3 - T(0.5) * d1;
    v[step] = even_a + a * odd_a, v[2 * step] = even_a - a * odd_a;
    v[3 * step] = even_b + b * odd_b, v[4 * step] = even_b - b * odd_b;
    v[5 * step] = d1 - T(2.5) * d3 + d[5 * step];
  }
  static void weight_row(const V* g, int64_t from, V* u, int64_t to) {  // 3 -> 6
    const V g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const V even_a = -(2 * g0 + g2) * third, odd_a = (2 * a * third) * g1;
    const V even_b = (g0 + 2 * g2) * (third / 2), odd_b = (a * third) * g1;
    u[0] = g0, u[to] = even_a - odd_a, u[2 * to] = even_a + odd_a;
    u[3 * to] = even_b + odd_b, u[4 * to] = even_b - odd_b, u[5 * to] = g2;
  }
  static void output_row(const V* m, int64_t from, V* w, int64_t to) {  // 6 -> 4
    const V even_a = m[from] + m[2 * from], odd_a = a * (m[from] - m[2 * from]);
    const V even_b = m[3 * from] + m[4 * from], odd_b = b * (m[3 * from] - m[4 * from]);
    w[0] = m[0] + even_a + even_b, w[to] = odd_a + odd_b;
    w[2 * to] = T(0.5) * even_a + 2 * even_b;
    w[3 * to] = T(0.5) * odd_a + 2 * odd_b + m[5 * from];
  }
  static void input(const V* d, V* v) {
    V half[36];
    for (int i = 0; i < 6; ++i) input_row(d + 6 * i, half + 6 * i, 1);
    for (int j = 0; j < 6; ++j) input_row(half + j, v + j, 6);
  }
  static void weight(const V* g, V* u) {  // 3x3 -> 6x6
    V half[18];
    for (int j = 0; j < 3; ++j) weight_row(g + j, 3, half + j, 3);
    for (int i = 0; i < 6; ++i) weight_row(half + 3 * i, 1, u + 6 * i, 1);
  }
  static void output(const V* m, V* w) {  // 6x6 -> 4x4
    V half[24];
    for (int j = 0; j < 6; ++j) output_row(m + j, 6, half + j, 6);
    for (int i = 0; i < 4; ++i) output_row(half + 6 * i, 1, w + 4 * i, 1);
  }
};

}  // namespace smis::SMIS_ISA
