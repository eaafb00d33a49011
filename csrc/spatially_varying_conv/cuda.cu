// CUDA kernels of the spatially varying convolution. Bound by memory: every weight is read once, 16
// bytes at a time where 3x3 kernels of single channels allow it, and the input comes from the caches.
#include "common/cuda.h"

namespace smis::cuda {
namespace {

template <class I> struct Strides {
  void* data = nullptr;
  I n = 0, c = 0, p = 0;
  template <class T> __device__ T* at(I image, I channel, I pixel) const {
    return static_cast<T*>(data) + image * n + channel * c + pixel * p;
  }
};

// Extents and strides; I is 32 bits wide where all offsets and counts are below 2^31.
template <class I> struct Conv {
  I N = 0, C = 0, G = 0, H = 0, W = 0, OH = 0, OW = 0, stride = 1, padding = 0, dilation = 1;
  int side = 1;  // of a kernel
  Strides<I> x, w, y;  // whichever is the result is written; y is the gradient in the backward
};

// An (n, channels, h, w) grid whose channels or columns vary fastest.
template <class I> struct Grid {
  I channels, h, w;
  Divider<I> by_channels, by_h, by_w;
  bool last;
  Grid(int64_t c, int64_t height, int64_t width, bool channels_last)
      : channels(I(c)), h(I(height)), w(I(width)), by_channels(c), by_h(height), by_w(width),
        last(channels_last) {}
  struct Place {
    I n, c, y, x;
  };
  __device__ Place operator()(I i) const {
    Place at{0, 0, 0, 0};
    if (last) {
      I rest = split(i, by_channels, channels);
      at.c = i, i = rest;
    }
    I rest = split(i, by_w, w);
    at.x = i, i = rest;
    rest = split(i, by_h, h);
    at.y = i, i = rest;
    if (!last) {
      rest = split(i, by_channels, channels);
      at.c = i, i = rest;
    }
    at.n = i;
    return at;
  }
};

// Kernels KxK, unrolled, those of 5x5 by rows; K is 0 where the side is read: with 64-bit offsets.
// All unrolled would take minutes to compile.
template <int K, class I> __device__ int side(const Conv<I>& a) { return K == 0 ? a.side : K; }
template <int K> constexpr int kUnrolled = K == 0 ? 1 : K == 5 ? 5 : K * K;

// One output a thread: any kernel size, stride, dilation and number of groups.
template <class T, int K, class I>
__global__ void forward_kernel(Conv<I> a, Grid<I> places, Divider<I> by_group, int64_t total) {
  const int k = side<K>(a);
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const auto at = places(I(i));
    const I top = at.y * a.stride - a.padding, left = at.x * a.stride - a.padding;
    const T* x = a.x.template at<const T>(at.n, at.c, 0);
    const T* w = a.w.template at<const T>(at.n, by_group(at.c) * k * k, at.y * a.OW + at.x);
    Acc<T> sum = 0;
#pragma unroll kUnrolled<K>
    for (int tap = 0; tap < k * k; ++tap) {
      const I y = top + tap / k * a.dilation, column = left + tap % k * a.dilation;
      const bool inside = y >= 0 && y < a.H && column >= 0 && column < a.W;
      const Acc<T> value = inside ? load(x[(y * a.W + column) * a.x.p]) : Acc<T>(0);
      sum += load(w[tap * a.w.c]) * value;  // outside too: NaN weights survive
    }
    *a.y.template at<T>(at.n, at.c, at.y * a.OW + at.x) = rounded<T>(sum);
  }
}

template <class T, int K, class I>
__global__ void grad_weight_kernel(Conv<I> a, Grid<I> places, I each, int64_t total) {
  const int k = side<K>(a);
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const auto at = places(I(i));
    const I pixel = at.y * a.OW + at.x;
#pragma unroll kUnrolled<K>
    for (int tap = 0; tap < k * k; ++tap) {
      const I y = at.y * a.stride - a.padding + tap / k * a.dilation;
      const I x = at.x * a.stride - a.padding + tap % k * a.dilation;
      const bool inside = y >= 0 && y < a.H && x >= 0 && x < a.W;
      Acc<T> sum = 0;
      for (I c = at.c * each; c < (at.c + 1) * each; ++c) {
        const Acc<T> value =
            inside ? load(*a.x.template at<const T>(at.n, c, y * a.W + x)) : Acc<T>(0);
        sum += load(*a.y.template at<const T>(at.n, c, pixel)) * value;
      }
      *a.w.template at<T>(at.n, at.c * k * k + tap, pixel) = rounded<T>(sum);
    }
  }
}

template <class T, int K, class I, bool unit>  // unit: of stride 1
__global__ void grad_input_kernel(Conv<I> a, Grid<I> places, Divider<I> by_group,
                                  Divider<I> by_stride, int64_t total) {
  const int k = side<K>(a);
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const auto at = places(I(i));
    const T* w = a.w.template at<const T>(at.n, by_group(at.c) * k * k, 0);
    const T* dy = a.y.template at<const T>(at.n, at.c, 0);
    Acc<T> sum = 0;
#pragma unroll kUnrolled<K>
    for (int tap = 0; tap < k * k; ++tap) {
      const I y = at.y + a.padding - tap / k * a.dilation;
      const I x = at.x + a.padding - tap % k * a.dilation;
      bool inside = y >= 0 && x >= 0;
      I row = inside ? y : 0, column = inside ? x : 0;
      if (!unit) {
        I below = row, beside = column;
        row = split(below, by_stride, a.stride), column = split(beside, by_stride, a.stride);
        inside = inside && below == 0 && beside == 0;
      }
      inside = inside && row < a.OH && column < a.OW;
      const I pixel = inside ? row * a.OW + column : 0;
      const Acc<T> weight = inside ? load(w[tap * a.w.c + pixel * a.w.p]) : Acc<T>(0);
      sum += weight * (inside ? load(dy[pixel * a.y.p]) : Acc<T>(0));
    }
    *a.x.template at<T>(at.n, at.c, at.y * a.W + at.x) = rounded<T>(sum);
  }
}

// 16 bytes of 3x3 kernels of single channels, of stride and dilation 1; 32-bit offsets.
using I = int32_t;
template <class T> constexpr int kPack = 16 / sizeof(T);
template <class T> using Packed = Pack<T, kPack<T>>;
template <class T> __device__ inline Packed<T> packed(const T* p) {
  return *reinterpret_cast<const Packed<T>*>(p);
}
template <class T> __device__ inline void store(T* p, const Packed<T>& v) {
  *reinterpret_cast<Packed<T>*>(p) = v;
}

// Planes: a thread has neighbouring columns of one channel, or writes their weights' gradient.
template <class T, bool gradient>
__global__ void planes_kernel(Conv<I> a, Grid<I> places, int64_t total) {
  constexpr int V = kPack<T>;
  for (int64_t i = thread_index(); i < total; i += thread_stride()) {
    const auto at = places(I(i));
    const I column = at.x * V, pixel = at.y * a.OW + column;
    const T* x = a.x.template at<const T>(at.n, at.c, 0);
    T* w = a.w.template at<T>(at.n, at.c * 9, pixel);
    T* out = a.y.template at<T>(at.n, at.c, pixel);
    Packed<T> y;
    if (gradient) y = packed<T>(out);
    Acc<T> sums[V] = {};
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      const I row = at.y - a.padding + ky;
      const bool inside = row >= 0 && row < a.H;
      Acc<T> line[V + 2];
#pragma unroll
      for (int v = 0; v < V + 2; ++v) {
        const I place = column - a.padding + v;
        line[v] = inside && place >= 0 && place < a.W ? load(x[row * a.W + place]) : Acc<T>(0);
      }
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
        T* weights = w + (ky * 3 + kx) * a.w.c;
        Packed<T> pack;
        if (!gradient) pack = packed<T>(weights);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (gradient) pack.v[v] = rounded<T>(load(y.v[v]) * line[v + kx]);
          else sums[v] += load(pack.v[v]) * line[v + kx];
        }
        if (gradient) store(weights, pack);
      }
    }
    if (gradient) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) y.v[v] = rounded<T>(sums[v]);
    store(out, y);
  }
}

// Rows: a thread has neighbouring channels of one pixel, whose weights lie side by side. Of the
// gradient, which is dense, a warp writes whole lines: its packs change threads in shared memory.
template <class T, bool gradient>
__global__ void rows_kernel(Conv<I> a, Grid<I> places, int64_t total) {
  constexpr int V = kPack<T>;
  __shared__ Packed<T> staged[gradient ? kThreads * 9 : 1];
  const int lane = threadIdx.x & kLane;
  for (int64_t start = thread_index() - lane; start < total; start += thread_stride()) {
    const int64_t i = start + lane;
    const auto at = places(I(i < total ? i : total - 1));
    const I c = at.c * V, pixel = at.y * a.OW + at.x;
    const T* x = a.x.template at<const T>(at.n, c, 0);
    const T* weights = a.w.template at<const T>(at.n, c * 9, pixel);
    T* out = a.y.template at<T>(at.n, c, pixel);
    Packed<T> w[9], y;  // w[k].v[v] is tap (k * V + v) % 9 of channel (k * V + v) / 9
    if (gradient) {
      y = packed<T>(out);
    } else {
#pragma unroll
      for (int k = 0; k < 9; ++k) w[k] = packed<T>(weights + k * V);
    }
    Acc<T> sums[V] = {};
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const I row = at.y - a.padding + tap / 3, column = at.x - a.padding + tap % 3;
      const bool inside = row >= 0 && row < a.H && column >= 0 && column < a.W;
      Packed<T> values = {};
      if (inside) values = packed<T>(x + (row * a.W + column) * a.x.p);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T& weight = w[(v * 9 + tap) / V].v[(v * 9 + tap) % V];
        if (gradient) weight = rounded<T>(load(y.v[v]) * load(values.v[v]));
        else sums[v] += load(weight) * load(values.v[v]);
      }
    }
    if (gradient) {
      Packed<T>* own = staged + (threadIdx.x - lane) * 9;
      T* line = static_cast<T*>(a.w.data) + start * 9 * V;
      const int packs = int(total - start < 32 ? total - start : 32) * 9;
#pragma unroll
      for (int k = 0; k < 9; ++k) own[lane * 9 + k] = w[k];
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 9; ++k)
        if (k * 32 + lane < packs) store(line + (k * 32 + lane) * V, own[k * 32 + lane]);
      __syncwarp();
    } else if (i < total) {
#pragma unroll
      for (int v = 0; v < V; ++v) y.v[v] = rounded<T>(sums[v]);
      store(out, y);
    }
  }
}

// Rows, gradient of the input: the lanes of a warp have neighbouring pixels of one pack of channels
// and pass what a kernel gives its left and right; three sums go down the rows.
constexpr int kBand = 16;  // rows of a warp
constexpr int kColumns = 30;  // of 32, whose last two only give
template <class T>
__global__ void grad_input_rows_kernel(Conv<I> a, Grid<I> places, int64_t warps) {
  constexpr int V = kPack<T>;
  const int lane = threadIdx.x & kLane;
  for (int64_t i = thread_index() / 32; i < warps; i += thread_stride() / 32) {
    const auto at = places(I(i));  // n, pack of channels, band, columns
    const I c = at.c * V, column = at.x * kColumns + lane, from = column + a.padding - 2;
    const T* w = a.w.template at<const T>(at.n, c * 9, 0);
    const T* dy = a.y.template at<const T>(at.n, c, 0);
    T* dx = a.x.template at<T>(at.n, c, 0);
    Acc<T> sums[3][V] = {};
    for (int step = -2; step < kBand; ++step) {
      const I row = at.y * kBand + step, given = row + a.padding;
      if (row >= a.H) break;
      const bool inside = given >= 0 && given < a.OH && from >= 0 && from < a.OW;
      Packed<T> weights[9] = {}, d = {};
      if (inside) {
        const I pixel = given * a.OW + from;
        d = packed<T>(dy + pixel * a.y.p);
#pragma unroll
        for (int k = 0; k < 9; ++k) weights[k] = packed<T>(w + pixel * a.w.p + k * V);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) {
          Acc<T> given_by[3];
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
            const int place = v * 9 + ky * 3 + kx;
            given_by[kx] = inside ? load(weights[place / V].v[place % V]) * load(d.v[v]) : Acc<T>(0);
          }
          sums[ky][v] += given_by[2] + __shfl_down_sync(kWarp, given_by[1], 1) +
                         __shfl_down_sync(kWarp, given_by[0], 2);
        }
      }
      if (step >= 0 && lane < kColumns && column < a.W) {
        Packed<T> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out.v[v] = rounded<T>(sums[0][v]);
        store(dx + (row * a.W + column) * a.x.p, out);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[0][v] = sums[1][v];
        sums[1][v] = sums[2][v];
        sums[2][v] = 0;
      }
    }
  }
}

Tensor dense(const Tensor& t) {
  return rows_dense(t) || planes_dense(t) ? t : torch::stable::contiguous(t);
}

// The last element's offset.
int64_t reach(const Tensor& t) {
  int64_t offset = 0;
  for (int64_t axis = 0; axis < 4; ++axis)
    offset += std::max<int64_t>(t.size(axis) - 1, 0) * t.stride(axis);
  return offset;
}

struct Window {
  int64_t kernel_size, stride, padding, dilation;
};

template <class I> Strides<I> strides(const Tensor& t) {
  const Operand o = operand(t);
  return {o.data, I(o.n), I(o.c), I(o.p)};
}

template <class I>
Conv<I> arguments(const Tensor& x, const Tensor& w, const Tensor& y, const Window& window) {
  Conv<I> a;
  a.N = I(x.size(0)), a.C = I(x.size(1)), a.H = I(x.size(2)), a.W = I(x.size(3));
  a.OH = I(y.size(2)), a.OW = I(y.size(3));
  a.G = I(w.size(1) / (window.kernel_size * window.kernel_size));
  a.side = int(window.kernel_size), a.stride = I(window.stride);
  a.padding = I(window.padding), a.dilation = I(window.dilation);
  a.x = strides<I>(x), a.w = strides<I>(w), a.y = strides<I>(y);
  return a;
}

// Calls fn(T{}, I{}): 32-bit offsets where they, and the taps around them, are below 2^31.
template <class F>
void with_offsets(const Tensor& x, const Tensor& w, const Tensor& y, const Window& window, const F& fn) {
  const int64_t around = 2 * (window.padding + window.kernel_size * window.dilation) + kBand + kColumns;
  const int64_t side = std::max({x.size(2), x.size(3), y.size(2) * window.stride, y.size(3) * window.stride});
  const bool narrow = std::max({reach(x), reach(w), reach(y), side + around}) < (int64_t(1) << 31);
  with_element(element_of(x, "spatially_varying_conv2d"), [&](auto t) {
    if (narrow) fn(t, int32_t{});
    else fn(t, int64_t{});
  });
}

template <bool unrolled, class F> void with_kernel_size(int64_t size, const F& fn) {
  if constexpr (!unrolled) fn(std::integral_constant<int, 0>{});
  else if (size == 1) fn(std::integral_constant<int, 1>{});
  else if (size == 3) fn(std::integral_constant<int, 3>{});
  else fn(std::integral_constant<int, 5>{});
}

enum class Form { any, planes, rows };

// Whether packs of `width` elements are aligned in all images, and in all rows or planes `other` apart.
bool aligned(const Tensor& t, int64_t width, int64_t other) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && other % width == 0 &&
         (t.size(0) == 1 || t.stride(0) % width == 0);
}

// Which kernel takes packs of `width` elements.
Form form(const Tensor& x, const Tensor& w, const Tensor& y, const Window& window, int64_t width) {
  const int64_t c = x.size(1);
  if (window.kernel_size != 3 || window.stride != 1 || window.dilation != 1 || w.size(1) != 9 * c)
    return Form::any;
  const auto rows = [&](const Tensor& t) { return channels_last(t) && aligned(t, width, operand(t).p); };
  if (c % width == 0 && rows(x) && rows(w) && rows(y)) return Form::rows;
  const auto planes = [&](const Tensor& t) {
    return planes_dense(t) && aligned(t, width, t.size(1) > 1 ? t.stride(1) : 0);
  };
  if (y.size(3) % width == 0 && planes(w) && planes(y) && planes_dense(x) && x.size(3) > 1)
    return Form::planes;
  return Form::any;
}

// One read of the weights, or one write of their gradient.
template <bool gradient>
void pass(const Launch& launch, const Tensor& x, const Tensor& w, const Tensor& y, const Window& window) {
  with_offsets(x, w, y, window, [&](auto t, auto offset) {
    using T = decltype(t);
    using Offset = decltype(offset);
    constexpr bool narrow = sizeof(Offset) == 4;
    const auto a = arguments<Offset>(x, w, y, window);
    const Form kind = narrow ? form(x, w, y, window, kPack<T>) : Form::any;
    const int64_t channels = gradient ? a.G : a.C;
    const int64_t items = int64_t(a.N) * channels * a.OH * a.OW / (kind == Form::any ? 1 : kPack<T>);
    const dim3 blocks = grid(items);
    if constexpr (narrow) {
      if (kind == Form::rows) {
        const Grid<I> places(a.C / kPack<T>, a.OH, a.OW, true);
        rows_kernel<T, gradient><<<blocks, kThreads, 0, launch.stream>>>(a, places, items);
        launch.check();
      }
      if (kind == Form::planes) {
        const Grid<I> places(a.C, a.OH, a.OW / kPack<T>, false);
        planes_kernel<T, gradient><<<blocks, kThreads, 0, launch.stream>>>(a, places, items);
        launch.check();
      }
    }
    if (kind != Form::any) return;
    const Grid<Offset> places(channels, a.OH, a.OW, channels_last(w));
    with_kernel_size<narrow>(window.kernel_size, [&](auto k) {
      if constexpr (gradient) {
        grad_weight_kernel<T, k(), Offset><<<blocks, kThreads, 0, launch.stream>>>(
            a, places, a.C / a.G, items);
      } else {
        forward_kernel<T, k(), Offset><<<blocks, kThreads, 0, launch.stream>>>(
            a, places, Divider<Offset>(a.C / a.G), items);
      }
      launch.check();
    });
  });
}

Tensor varying_conv(const Tensor& input, const Tensor& weight, int64_t kernel_size, int64_t stride,
                    int64_t padding, int64_t dilation) {
  const Launch launch(input, "spatially_varying_conv2d");
  const Tensor x = dense(input), w = dense(weight);
  const Tensor y = empty_nchw(x.size(0), x.size(1), w.size(2), w.size(3), channels_last(input), x);
  if (y.numel() != 0) pass<false>(launch, x, w, y, {kernel_size, stride, padding, dilation});
  return y;
}

Tensor varying_conv_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                int64_t kernel_size, int64_t stride, int64_t padding,
                                int64_t dilation) {
  const Launch launch(grad, "spatially_varying_conv2d");
  // In the weights' format, nine times as large: a copy costs less than mixed accesses.
  const bool last = channels_last(weight);
  const Tensor x = laid_out(input, last), y = laid_out(grad, last);
  const Tensor w = empty_nchw(weight.size(0), weight.size(1), weight.size(2), weight.size(3), last, x);
  if (w.numel() != 0) pass<true>(launch, x, w, y, {kernel_size, stride, padding, dilation});
  return w;
}

Tensor varying_conv_grad_input(const Tensor& grad, const Tensor& weight, int64_t height,
                               int64_t width, bool last, int64_t kernel_size, int64_t stride,
                               int64_t padding, int64_t dilation) {
  const Launch launch(grad, "spatially_varying_conv2d");
  const Tensor w = dense(weight), y = laid_out(grad, channels_last(w));
  const Tensor x = empty_nchw(grad.size(0), grad.size(1), height, width, last, y);
  if (x.numel() == 0) return x;
  const Window window{kernel_size, stride, padding, dilation};
  with_offsets(x, w, y, window, [&](auto t, auto offset) {
    using T = decltype(t);
    using Offset = decltype(offset);
    constexpr bool narrow = sizeof(Offset) == 4;
    const auto a = arguments<Offset>(x, w, y, window);
    const bool rows = narrow && form(x, w, y, window, kPack<T>) == Form::rows;
    if constexpr (narrow) {
      if (rows) {
        const Grid<I> places(a.C / kPack<T>, ceil_div(a.H, kBand), ceil_div(a.W, kColumns), true);
        const int64_t warps = int64_t(a.N) * places.channels * places.h * places.w;
        grad_input_rows_kernel<T>
            <<<grid(warps * 32), kThreads, 0, launch.stream>>>(a, places, warps);
        launch.check();
      }
    }
    if (!rows) {
      const Grid<Offset> places(a.C, a.H, a.W, channels_last(w));
      with_kernel_size<narrow>(kernel_size, [&](auto k) {
        const Divider<Offset> by_group(a.C / a.G), by_stride(stride);
        if (narrow && stride == 1)
          grad_input_kernel<T, k(), Offset, narrow>
              <<<grid(x.numel()), kThreads, 0, launch.stream>>>(a, places, by_group, by_stride,
                                                                x.numel());
        else
          grad_input_kernel<T, k(), Offset, false><<<grid(x.numel()), kThreads, 0, launch.stream>>>(
              a, places, by_group, by_stride, x.numel());
        launch.check();
      });
    }
  });
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("varying_conv", TORCH_BOX(&varying_conv));
  m.impl("varying_conv_grad_weight", TORCH_BOX(&varying_conv_grad_weight));
  m.impl("varying_conv_grad_input", TORCH_BOX(&varying_conv_grad_input));
}

}  // namespace
}  // namespace smis::cuda
