// class_boxes, class_crops and class_crops_backward on CUDA: no atomics on floats, no host wait.
#include "class_crops/operands.h"
#include "common/cuda.h"

namespace smis::cuda {
namespace {

constexpr int64_t kSharedClasses = 2048;  // more classes reduce in global memory

// The class of a pixel; -1 for a label that is no class.
__device__ int32_t label_at(const ClassCropsArgs& a, int64_t n, int64_t y, int64_t x) {
  int64_t label = -1;
  if (!a.planes)
    switch (a.labels) {  // with_ids calls no device code
      case Ids::u8: label = *at<uint8_t>(a.semantics, n, 0, y, x); break;
      case Ids::i8: label = *at<int8_t>(a.semantics, n, 0, y, x); break;
      case Ids::i16: label = *at<int16_t>(a.semantics, n, 0, y, x); break;
      case Ids::u16: label = *at<uint16_t>(a.semantics, n, 0, y, x); break;
      case Ids::i32: label = *at<int32_t>(a.semantics, n, 0, y, x); break;
      case Ids::i64: label = *at<int64_t>(a.semantics, n, 0, y, x); break;
    }
  return label >= 0 && label < a.C ? int32_t(label) : -1;
}

template <class T>
__device__ Acc<T> mask_at(const ClassCropsArgs& a, int64_t n, int32_t c, int64_t y, int64_t x) {
  if (a.planes) return load(*at<T>(a.semantics, n, c, y, x));
  return label_at(a, n, y, x) == c ? Acc<T>(1) : Acc<T>(0);
}

// A box in reduction: every bound is a maximum above 0, so that cleared memory is the empty box.
struct Bounds {
  int32_t top, bottom, left, right;  // H - y0, y1, W - x0, x1
};

__device__ void raise(int32_t* bound, int32_t value) {
  if (*bound < value) atomicMax(bound, value);
}

// The lanes of `group` merge their pixels; one of them raises the bounds.
__device__ void raise_group(unsigned group, Bounds* box, const ClassCropsArgs& a, int32_t y,
                            int32_t x) {
  const int32_t top = warp_max(group, int32_t(a.H) - y);
  const int32_t bottom = warp_max(group, y + 1);
  const int32_t left = warp_max(group, int32_t(a.W) - x);
  const int32_t right = warp_max(group, x + 1);
  if ((threadIdx.x & kLane) == __ffs(int(group)) - 1) {
    raise(&box->top, top);
    raise(&box->bottom, bottom);
    raise(&box->left, left);
    raise(&box->right, right);
  }
}

// found (N, C + 1): the classes' boxes, then that of the non-finite pixels, which survive every
// mask. With per-class planes only the latter are found here.
template <class T>
__global__ void label_boxes_kernel(ClassCropsArgs a, Bounds* found, bool in_shared) {
  extern __shared__ Bounds local[];
  const int32_t rows = int32_t(a.C) + 1, pixels = int32_t(a.H * a.W);
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    Bounds* global = found + n * rows;
    Bounds* boxes = in_shared ? local : global;
    if (in_shared)
      for (int32_t c = threadIdx.x; c < rows; c += blockDim.x) local[c] = {0, 0, 0, 0};
    __syncthreads();
    const int64_t stride = thread_stride();
    for (int64_t start = thread_index() - (threadIdx.x & kLane); start < pixels; start += stride) {
      const int32_t i = int32_t(start) + int32_t(threadIdx.x & kLane);
      int32_t box = -1, y = 0, x = 0;
      if (i < pixels) {
        y = i / int32_t(a.W);
        x = i - y * int32_t(a.W);
        bool filled = false, finite = true;
        for (int64_t k = 0; k < a.K; ++k) {
          const Acc<T> v = load(*at<T>(a.image, n, k, y, x));
          filled |= v != Acc<T>(0);
          finite &= v - v == Acc<T>(0);
        }
        if (!finite)
          box = int32_t(a.C);
        else if (filled)
          box = label_at(a, n, y, x);
      }
      const unsigned group = __match_any_sync(kWarp, box);
      if (box >= 0) raise_group(group, boxes + box, a, y, x);
    }
    __syncthreads();
    if (in_shared)
      for (int32_t c = threadIdx.x; c < rows; c += blockDim.x)
        if (local[c].top > 0) {
          raise(&global[c].top, local[c].top);
          raise(&global[c].bottom, local[c].bottom);
          raise(&global[c].left, local[c].left);
          raise(&global[c].right, local[c].right);
        }
    __syncthreads();
  }
}

template <class T> __global__ void plane_boxes_kernel(ClassCropsArgs a, Bounds* found) {
  const int32_t pixels = int32_t(a.H * a.W);
  for (int64_t plane = blockIdx.y; plane < a.N * a.C; plane += gridDim.y) {
    const int64_t n = plane / a.C, c = plane - n * a.C;
    const int64_t stride = thread_stride();
    for (int64_t start = thread_index() - (threadIdx.x & kLane); start < pixels; start += stride) {
      const int32_t i = int32_t(start) + int32_t(threadIdx.x & kLane);
      const int32_t y = i / int32_t(a.W), x = i - y * int32_t(a.W);
      bool filled = false;
      if (i < pixels) {
        const Acc<T> mask = load(*at<T>(a.semantics, n, c, y, x));
        if (mask != Acc<T>(0))
          for (int64_t k = 0; k < a.K; ++k)
            filled |= load(rounded<T>(load(*at<T>(a.image, n, k, y, x)) * mask)) != Acc<T>(0);
      }
      const unsigned group = __ballot_sync(kWarp, filled);
      if (filled) raise_group(group, found + n * (a.C + 1) + c, a, y, x);
    }
  }
}

__global__ void finish_boxes_kernel(ClassCropsArgs a, const Bounds* found, Box* boxes) {
  const int32_t height = int32_t(a.H), width = int32_t(a.W);
  for (int64_t i = thread_index(); i < a.N * a.C; i += thread_stride()) {
    const int64_t n = i / a.C;
    const Bounds own = found[i + n], all = found[n * (a.C + 1) + a.C];
    const int32_t top = max(own.top, all.top);
    boxes[i] = top == 0 ? Box{0, 0, 0, 0}
                        : Box{height - top, max(own.bottom, all.bottom),
                              width - max(own.left, all.left), max(own.right, all.right)};
  }
}

__device__ bool absent(const Box& box) { return box.y1 <= box.y0 || box.x1 <= box.x0; }

template <class T, int V> __global__ void plane_crops_kernel(ClassCropsArgs a) {
  const int32_t width = int32_t(a.out_w), packs = int32_t(a.out_h * a.out_w / V);
  for (int64_t plane = blockIdx.y; plane < a.N * a.C; plane += gridDim.y) {
    const int64_t n = plane / a.C, c = plane - n * a.C;
    const Box box = a.boxes[plane];
    const bool empty = absent(box);
    const Nearest down(box.y1 - box.y0, int32_t(a.out_h)), across(box.x1 - box.x0, width);
    for (int64_t i = thread_index(); i < packs; i += thread_stride()) {
      const int32_t y = int32_t(i) * V / width, x = int32_t(i) * V - y * width;
      T* out = const_cast<T*>(at<T>(a.crops, n, c * a.K, y, x));
      const int32_t row = empty ? 0 : box.y0 + down.source(y);
      int32_t column[V];
      Acc<T> mask[V];
      for (int j = 0; j < V; ++j) {
        column[j] = empty ? 0 : box.x0 + across.source(x + j);
        mask[j] = empty ? Acc<T>(0) : mask_at<T>(a, n, int32_t(c), row, column[j]);
      }
      for (int64_t k = 0; k < a.K; ++k) {
        Pack<T, V> values;
        for (int j = 0; j < V; ++j)
          values.v[j] = empty ? rounded<T>(Acc<T>(0))
                              : rounded<T>(load(*at<T>(a.image, n, k, row, column[j])) * mask[j]);
        store_whole(out + k * a.crops.c, values);
      }
    }
  }
}

// Channels last: neighbouring threads hold neighbouring classes of one pixel.
template <class T> __global__ void pixel_crops_kernel(ClassCropsArgs a) {
  const int32_t classes = int32_t(a.C);
  for (int64_t line = blockIdx.y; line < a.N * a.out_h; line += gridDim.y) {
    const int64_t n = line / a.out_h, y = line - n * a.out_h;
    for (int64_t i = thread_index(); i < a.out_w * a.C; i += thread_stride()) {
      const int32_t x = int32_t(i / classes), c = int32_t(i - int64_t(x) * classes);
      const Box box = a.boxes[n * a.C + c];
      T* out = const_cast<T*>(at<T>(a.crops, n, c * a.K, y, x));
      if (absent(box)) {
        for (int64_t k = 0; k < a.K; ++k) out[k] = rounded<T>(Acc<T>(0));
        continue;
      }
      const int32_t row = box.y0 + Nearest(box.y1 - box.y0, int32_t(a.out_h)).source(int32_t(y));
      const int32_t column = box.x0 + Nearest(box.x1 - box.x0, int32_t(a.out_w)).source(x);
      const Acc<T> mask = mask_at<T>(a, n, c, row, column);
      for (int64_t k = 0; k < a.K; ++k)
        out[k] = rounded<T>(load(*at<T>(a.image, n, k, row, column)) * mask);
    }
  }
}

// The crop's pixels that read one source pixel: a rectangle, since nearest is monotone.
struct Range {
  int32_t y0, y1, x0, x1;
  __device__ int32_t area() const { return (y1 - y0) * (x1 - x0); }
};

__device__ Range readers(const ClassCropsArgs& a, const Box& box, int32_t y, int32_t x) {
  if (y < box.y0 || y >= box.y1 || x < box.x0 || x >= box.x1) return {0, 0, 0, 0};
  const Nearest down(box.y1 - box.y0, int32_t(a.out_h)), across(box.x1 - box.x0, int32_t(a.out_w));
  return {down.first(y - box.y0), down.first(y - box.y0 + 1), across.first(x - box.x0),
          across.first(x - box.x0 + 1)};
}

// Sums over each lane's range, of `count` channels from `channel` on. A range that one lane would
// take long over (a small box, stretched far) is summed by the whole warp, lane after lane: the
// order is fixed.
template <class T, int CH> __device__ void range_sums(const ClassCropsArgs& a, int64_t n,
                                                      int32_t channel, int count, Range range,
                                                      Acc<T> (&sum)[CH]) {
  constexpr int32_t kAlone = 32;
  const int lane = threadIdx.x & kLane;
  const int32_t area = range.area();
  for (int j = 0; j < CH; ++j) sum[j] = 0;
  if (area <= kAlone)
    for (int32_t y = range.y0; y < range.y1; ++y)
      for (int32_t x = range.x0; x < range.x1; ++x)
        for (int j = 0; j < CH; ++j)
          if (j < count) sum[j] += load(*at<T>(a.crops, n, channel + j, y, x));
  for (unsigned left = __ballot_sync(kWarp, area > kAlone); left; left &= left - 1) {
    const int owner = __ffs(int(left)) - 1;
    const int32_t c = __shfl_sync(kWarp, channel, owner), y0 = __shfl_sync(kWarp, range.y0, owner);
    const int32_t x0 = __shfl_sync(kWarp, range.x0, owner);
    const int32_t width = __shfl_sync(kWarp, range.x1, owner) - x0;
    const int32_t pixels = __shfl_sync(kWarp, area, owner);
    Acc<T> part[CH] = {};
    for (int32_t i = lane; i < pixels; i += 32)
      for (int j = 0; j < CH; ++j)
        if (j < count) part[j] += load(*at<T>(a.crops, n, c + j, y0 + i / width, x0 + i % width));
    for (int j = 0; j < CH; ++j) {
      for (int step = 16; step > 0; step /= 2) part[j] += __shfl_xor_sync(kWarp, part[j], step);
      if (lane == owner) sum[j] = part[j];
    }
  }
}

// A mask is read once for kTogether channels, and the crops where it is not 0.
template <class T> __global__ void backward_kernel(ClassCropsArgs a) {
  constexpr int32_t kTogether = 4;
  const int32_t pixels = int32_t(a.H * a.W), channels = int32_t(a.K);
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    const int64_t stride = thread_stride();
    for (int64_t start = thread_index() - (threadIdx.x & kLane); start < pixels; start += stride) {
      const int32_t i = int32_t(start) + int32_t(threadIdx.x & kLane);
      const bool inside = i < pixels;
      const int32_t y = i / int32_t(a.W), x = i - y * int32_t(a.W);
      const int32_t own = inside ? label_at(a, n, y, x) : -1;
      const int32_t first = a.planes ? 0 : own, count = a.planes ? int32_t(a.C) : 1;
      for (int32_t k = 0; k < channels; k += kTogether) {
        Acc<T> grad[kTogether] = {};
        for (int32_t step = 0; step < count; ++step) {  // the warp stays together for range_sums
          const int32_t c = first + step;
          Acc<T> mask = 0;
          if (inside && c >= 0) mask = a.planes ? load(*at<T>(a.semantics, n, c, y, x)) : Acc<T>(1);
          const Range range =
              mask != Acc<T>(0) ? readers(a, a.boxes[n * a.C + c], y, x) : Range{0, 0, 0, 0};
          if (!__any_sync(kWarp, range.area() > 0)) continue;
          Acc<T> sum[kTogether];
          range_sums<T>(a, n, c * channels + k, channels - k, range, sum);
          for (int j = 0; j < kTogether; ++j)
            if (range.area() > 0) grad[j] += sum[j] * mask;
        }
        for (int j = 0; j < kTogether; ++j)
          if (inside && k + j < channels)
            *const_cast<T*>(at<T>(a.image, n, k + j, y, x)) = rounded<T>(grad[j]);
      }
    }
  }
}

Tensor class_boxes(const Tensor& image, const Tensor& semantics, int64_t num_classes) {
  const ClassCropsArgs a = arguments(image, semantics, num_classes);
  check_plane("image", a.H, a.W);
  const Launch launch(image, "class_boxes");
  Tensor out = empty_of(image, {a.N, a.C, 4}, ScalarType::Int);
  if (a.N == 0) return out;
  const Tensor scratch = empty_of(image, {a.N, a.C + 1, 4}, ScalarType::Int);
  auto* found = static_cast<Bounds*>(scratch.mutable_data_ptr());
  const int64_t bytes = (a.C + 1) * int64_t(sizeof(Bounds));
  launch.clear(found, a.N * bytes);
  const bool in_shared = a.C < kSharedClasses;
  // A block per 2048 pixels: enough work to pay for clearing and merging its boxes.
  const dim3 blocks = grid(ceil_div(a.H * a.W, 8), a.N);
  with_element(a.element, [&](auto t) {
    using T = decltype(t);
    label_boxes_kernel<T><<<blocks, kThreads, in_shared ? size_t(bytes) : 0, launch.stream>>>(
        a, found, in_shared);
    launch.check();
    if (a.planes) {
      plane_boxes_kernel<T><<<grid(ceil_div(a.H * a.W, 4), a.N * a.C), kThreads, 0,
                              launch.stream>>>(a, found);
      launch.check();
    }
  });
  finish_boxes_kernel<<<grid(a.N * a.C), kThreads, 0, launch.stream>>>(
      a, found, static_cast<Box*>(out.mutable_data_ptr()));
  launch.check();
  return out;
}

Tensor class_crops(const Tensor& image, const Tensor& semantics, const Tensor& boxes,
                   int64_t height, int64_t width) {
  ClassCropsArgs a = arguments(image, semantics, boxes.size(1));
  check_plane("size", height, width);
  const Launch launch(image, "class_crops");
  const Tensor held = crop_arguments(a, boxes, height, width);
  a.last = channels_last(image);
  Tensor out = empty_nchw(a.N, a.C * a.K, height, width, a.last, image);
  if (out.numel() == 0) return out;
  a.crops = strided(out);
  with_element(a.element, [&](auto t) {
    using T = decltype(t);
    constexpr int V = 16 / sizeof(T);
    if (a.last)
      pixel_crops_kernel<T><<<grid(width * a.C, a.N * height), kThreads, 0, launch.stream>>>(a);
    else if (width % V == 0)
      plane_crops_kernel<T, V>
          <<<grid(height * width / V, a.N * a.C), kThreads, 0, launch.stream>>>(a);
    else
      plane_crops_kernel<T, 1><<<grid(height * width, a.N * a.C), kThreads, 0, launch.stream>>>(a);
  });
  launch.check();
  return out;
}

Tensor class_crops_backward(const Tensor& grad, const Tensor& semantics, const Tensor& boxes,
                            int64_t height, int64_t width, bool last) {
  check_plane("image", height, width);
  const Launch launch(grad, "class_crops");
  Tensor out = empty_nchw(grad.size(0), grad.size(1) / boxes.size(1), height, width, last, grad);
  ClassCropsArgs a = arguments(out, semantics, boxes.size(1));
  const Tensor held = crop_arguments(a, boxes, grad.size(2), grad.size(3));
  a.crops = strided(grad);
  if (out.numel() == 0) return out;
  with_element(a.element, [&](auto t) {
    backward_kernel<decltype(t)><<<grid(height * width, a.N), kThreads, 0, launch.stream>>>(a);
  });
  launch.check();
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CUDA, m) {
  m.impl("class_boxes", TORCH_BOX(&class_boxes));
  m.impl("class_crops", TORCH_BOX(&class_crops));
  m.impl("class_crops_backward", TORCH_BOX(&class_crops_backward));
}

}  // namespace
}  // namespace smis::cuda
