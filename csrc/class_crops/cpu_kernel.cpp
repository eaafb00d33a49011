// The loops of class_crops: boxes from one pass over the masks, each output row written once.
#include "class_crops/cpu_kernel.h"

#include <algorithm>
#include <limits>

#include "common/element.h"
#include "common/stream.h"

namespace smis::SMIS_ISA {
namespace {

template <class T> struct Format;
template <class B, B e> struct Layout {
  using Bits = B;
  static constexpr B exponent = e;
};
template <> struct Format<float> : Layout<uint32_t, 0x7f800000> {};
template <> struct Format<double> : Layout<uint64_t, 0x7ffull << 52> {};
template <> struct Format<Half> : Layout<uint16_t, 0x7c00> {};
template <> struct Format<BFloat16> : Layout<uint16_t, 0x7f80> {};

template <class T> inline typename Format<T>::Bits bits_of(const T& v) {
  typename Format<T>::Bits bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
template <class T>
constexpr typename Format<T>::Bits kMagnitude = typename Format<T>::Bits(~0ull) >> 1;

template <class T> inline bool is_zero(const T& v) { return (bits_of(v) & kMagnitude<T>) == 0; }
template <class T> inline bool is_finite(const T& v) {
  return (bits_of(v) & Format<T>::exponent) != Format<T>::exponent;
}
// Both are integer reductions over n elements, `stride` apart, so that they vectorise.
template <class T> inline bool row_zero(const T* p, int64_t stride, int64_t n) {
  typename Format<T>::Bits any = 0;
  for (int64_t i = 0; i < n; ++i) any |= bits_of(p[i * stride]);
  return (any & kMagnitude<T>) == 0;
}
template <class T> inline bool row_finite(const T* p, int64_t stride, int64_t n) {
  typename Format<T>::Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const typename Format<T>::Bits exponent = bits_of(p[i * stride]) & Format<T>::exponent;
    largest = exponent > largest ? exponent : largest;
  }
  return largest != Format<T>::exponent;
}

inline void extend(Box& box, int64_t y, int64_t x0, int64_t x1) {
  const int32_t row = int32_t(y), begin = int32_t(x0), end = int32_t(x1);
  box = box.y1 > box.y0 ? Box{std::min(box.y0, row), std::max(box.y1, row + 1),
                              std::min(box.x0, begin), std::max(box.x1, end)}
                        : Box{row, row + 1, begin, end};
}

// n elements, `stride` apart, as the accumulation type.
template <class T>
inline const Acc<T>* gathered(const T* p, int64_t stride, int64_t n, Acc<T>* buffer) {
  if (stride == 1) return staged(p, n, buffer);
  for (int64_t i = 0; i < n; ++i) buffer[i] = load(p[i * stride]);
  return buffer;
}

template <class L, class A>
inline void equal_row(const L* p, int64_t stride, int64_t n, int64_t c, A* out) {
  if (c > int64_t(std::numeric_limits<L>::max())) {
    std::fill(out, out + n, A(0));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride] == L(c) ? A(1) : A(0);
  }
}

// The mask of class c over pixels [x0, x0 + n) of a row.
template <class T>
const Acc<T>* mask_row(const ClassCropsArgs& a, int64_t image, int64_t c, int64_t y, int64_t x0,
                       int64_t n, Acc<T>* buffer) {
  if (a.planes)
    return gathered(at<const T>(a.semantics, image, c, y, x0), a.semantics.w, n, buffer);
  with_ids(a.labels, [&](auto label) {
    equal_row(at<const decltype(label)>(a.semantics, image, 0, y, x0), a.semantics.w, n, c, buffer);
  });
  return buffer;
}

// One call's rows of scratch.
template <class T> struct Rows {
  int64_t width;
  Acc<T> *mask, *stage, *work, *sum;
  int32_t* index;
  T *zero, *crop, *stretched, *line;  // crop and stretched have K rows
  Acc<T>* grad;                       // K rows, in place of crop
  Rows(const ClassCropsArgs& a, void* scratch) : width(std::max(a.W, a.out_w)) {
    const auto row = [&](int64_t i) { return static_cast<Acc<T>*>(scratch) + i * width; };
    mask = row(0), stage = row(1), work = row(2), sum = row(3);
    index = reinterpret_cast<int32_t*>(row(4));
    zero = reinterpret_cast<T*>(row(5));
    grad = row(6);
    crop = reinterpret_cast<T*>(grad);
    stretched = reinterpret_cast<T*>(row(6 + a.K));
    line = reinterpret_cast<T*>(row(6 + 2 * a.K));
  }
};

// Whether class pixels count: what the box rule asks of image * mask.
template <class T> inline bool any_nonzero(const ClassCropsArgs& a, const T* pixel) {
  for (int64_t k = 0; k < a.K; ++k)
    if (!is_zero(pixel[k * a.image.c])) return true;
  return false;
}
template <class T>
inline bool product_nonzero(const ClassCropsArgs& a, const T* pixel, Acc<T> mask) {
  for (int64_t k = 0; k < a.K; ++k) {
    T product;
    store(product, load(pixel[k * a.image.c]) * mask);
    if (!is_zero(product)) return true;
  }
  return false;
}

template <class T> void nonfinite_box(const ClassCropsArgs& a, int64_t n, int64_t y, Box& box) {
  for (int64_t k = 0; k < a.K; ++k) {
    const T* p = at<const T>(a.image, n, k, y, 0);
    if (row_finite(p, a.image.w, a.W)) continue;
    for (int64_t x = 0; x < a.W; ++x)
      if (!is_finite(p[x * a.image.w])) extend(box, y, x, x + 1);
  }
}

// Runs of one label touch their box once.
template <class T, class L>
void label_boxes(const ClassCropsArgs& a, int64_t n, int64_t y, Box* boxes, int64_t* unknown) {
  const L* label = at<const L>(a.semantics, n, 0, y, 0);
  const T* pixel = at<const T>(a.image, n, 0, y, 0);
  const int64_t step = a.semantics.w;
  for (int64_t x = 0; x < a.W;) {
    const L c = label[x * step];
    int64_t end = x + 1;
    while (end < a.W && label[end * step] == c) ++end;
    if (c < 0 || int64_t(c) >= a.C) {
      *unknown = int64_t(c);
    } else {
      int64_t first = x, last = end;
      while (first < last && !any_nonzero(a, pixel + first * a.image.w)) ++first;
      while (last > first && !any_nonzero(a, pixel + (last - 1) * a.image.w)) --last;
      if (first < last) extend(boxes[c], y, first, last);
    }
    x = end;
  }
}

template <class T>
void plane_boxes(const ClassCropsArgs& a, int64_t n, int64_t c, int64_t y, Box& box,
                 Acc<T>* buffer) {
  constexpr int64_t kSkip = 32;
  const T* plane = at<const T>(a.semantics, n, c, y, 0);
  const int64_t step = a.semantics.w;
  int64_t first = 0, last = a.W;
  while (last - first >= kSkip && row_zero(plane + first * step, step, kSkip)) first += kSkip;
  while (last - first >= kSkip && row_zero(plane + (last - kSkip) * step, step, kSkip))
    last -= kSkip;
  if (row_zero(plane + first * step, step, last - first)) return;
  const Acc<T>* mask = mask_row<T>(a, n, c, y, 0, a.W, buffer);
  const T* pixel = at<const T>(a.image, n, 0, y, 0);
  const auto counts = [&](int64_t x) {
    return mask[x] != Acc<T>(0) && product_nonzero(a, pixel + x * a.image.w, mask[x]);
  };
  while (first < last && !counts(first)) ++first;
  while (last > first && !counts(last - 1)) --last;
  if (first < last) extend(box, y, first, last);
}

template <class T>
void boxes_rows(const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1, Box* boxes,
                void* scratch, int64_t* unknown) {
  for (int64_t y = y0; y < y1; ++y) nonfinite_box<T>(a, n, y, boxes[a.C]);
  if (a.planes) {
    auto* buffer = static_cast<Acc<T>*>(scratch);
    for (int64_t c = 0; c < a.C; ++c)
      for (int64_t y = y0; y < y1; ++y) plane_boxes<T>(a, n, c, y, boxes[c], buffer);
    return;
  }
  with_ids(a.labels, [&](auto label) {
    for (int64_t y = y0; y < y1; ++y) label_boxes<T, decltype(label)>(a, n, y, boxes, unknown);
  });
}

inline bool absent(const Box& box) { return box.y1 <= box.y0 || box.x1 <= box.x0; }

// image * mask of class c over the box's columns of a row: K rows in storage type.
template <class T>
void masked_rows(const ClassCropsArgs& a, int64_t n, int64_t c, int64_t y, const Box& box,
                 const Rows<T>& rows) {
  const int64_t width = box.x1 - box.x0;
  const Acc<T>* mask = mask_row<T>(a, n, c, y, box.x0, width, rows.mask);
  for (int64_t k = 0; k < a.K; ++k) {
    const Acc<T>* v = gathered(at<const T>(a.image, n, k, y, box.x0), a.image.w, width, rows.stage);
    T* crop = rows.crop + k * rows.width;
    Acc<T>* product = out_buffer(crop, rows.work);
    for (int64_t x = 0; x < width; ++x) product[x] = v[x] * mask[x];
    unstage(crop, product, width);
  }
}

inline void put(void* out, const void* row, int64_t bytes, bool stream) {
  if (stream)
    stream_bytes(out, row, bytes);
  else
    std::memcpy(out, row, size_t(bytes));
}

// row[x] = crop[index[x]]. A widened crop's neighbours read neighbours: one load and one shuffle
// replace a gather; the load may pass the crop's end, where scratch goes on.
template <class T>
inline void stretch(T* row, const T* crop, const int32_t* index, int64_t n, bool widened) {
  int64_t x = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; widened && x + 16 <= n; x += 16) {
      const __m512i from = _mm512_sub_epi32(_mm512_loadu_si512(index + x),
                                            _mm512_set1_epi32(index[x]));
      _mm512_storeu_si512(row + x,
                          _mm512_permutexvar_epi32(from, _mm512_loadu_si512(crop + index[x])));
    }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    for (; widened && x + 8 <= n; x += 8) {
      const auto load8 = [](const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
      };
      const __m256i from = _mm256_sub_epi32(load8(index + x), _mm256_set1_epi32(index[x]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + x),
                          _mm256_permutevar8x32_epi32(load8(crop + index[x]), from));
    }
#endif
  for (; x < n; ++x) row[x] = crop[index[x]];
}

inline void sources(const Nearest& nearest, int32_t* index) {
  for (int32_t x = 0; x < nearest.out; ++x) index[x] = nearest.source(x);
}

template <class T>
void plane_crops(const ClassCropsArgs& a, int64_t n, int64_t c, int64_t y0, int64_t y1,
                 const Rows<T>& rows) {
  const Box box = a.boxes[n * a.C + c];
  const bool empty = absent(box);
  const int64_t bytes = a.out_w * int64_t(sizeof(T));
  const Nearest down(box.y1 - box.y0, int32_t(a.out_h)), across(box.x1 - box.x0, int32_t(a.out_w));
  if (!empty) sources(across, rows.index);
  // Past kExact pixels the rounded scale could step by two even in a widened crop.
  constexpr int32_t kExact = 8192;
  const bool widened = across.in <= across.out && across.out <= kExact;
  int32_t previous = -1;
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t source = empty ? -1 : down.source(int32_t(y));
    const bool fresh = source != previous;
    if (fresh) masked_rows(a, n, c, box.y0 + source, box, rows);
    previous = source;
    for (int64_t k = 0; k < a.K; ++k) {
      T* row = rows.stretched + k * rows.width;
      const T* crop = rows.crop + k * rows.width;
      if (fresh) stretch(row, crop, rows.index, a.out_w, widened);
      put(at<T>(a.crops, n, c * a.K + k, y, 0), empty ? rows.zero : row, bytes, a.stream);
    }
  }
}

template <class T>
void pixel_crops(const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1, const Rows<T>& rows) {
  const int64_t bytes = a.out_w * a.crops.w * int64_t(sizeof(T));
  for (int64_t y = y0; y < y1; ++y) {
    T* out = at<T>(a.crops, n, 0, y, 0);
    T* line = a.stream ? rows.line : out;
    // A streamed line is cleared once: every row writes the same classes.
    if (!a.stream || y == y0) std::memset(line, 0, size_t(bytes));
    for (int64_t c = 0; c < a.C; ++c) {
      const Box box = a.boxes[n * a.C + c];
      if (absent(box)) continue;
      const Nearest down(box.y1 - box.y0, int32_t(a.out_h));
      masked_rows(a, n, c, box.y0 + down.source(int32_t(y)), box, rows);
      sources(Nearest(box.x1 - box.x0, int32_t(a.out_w)), rows.index);
      for (int64_t x = 0; x < a.out_w; ++x)
        for (int64_t k = 0; k < a.K; ++k)
          line[x * a.crops.w + c * a.K + k] = rows.crop[k * rows.width + rows.index[x]];
    }
    if (a.stream) stream_bytes(out, line, bytes);
  }
}

template <class T>
void backward_row(const ClassCropsArgs& a, int64_t n, int64_t y, const Rows<T>& rows) {
  using A = Acc<T>;
  for (int64_t k = 0; k < a.K; ++k)
    std::fill(rows.grad + k * rows.width, rows.grad + k * rows.width + a.W, A(0));
  for (int64_t c = 0; c < a.C; ++c) {
    const Box box = a.boxes[n * a.C + c];
    if (absent(box) || y < box.y0 || y >= box.y1) continue;
    const int32_t width = box.x1 - box.x0, row = int32_t(y) - box.y0;
    const Nearest down(box.y1 - box.y0, int32_t(a.out_h)), across(width, int32_t(a.out_w));
    const int32_t first = down.first(row), last = down.first(row + 1);
    if (first == last) continue;
    sources(across, rows.index);
    const A* mask = mask_row<T>(a, n, c, y, box.x0, width, rows.mask);
    for (int64_t k = 0; k < a.K; ++k) {
      std::fill(rows.work, rows.work + a.out_w, A(0));
      for (int64_t dst = first; dst < last; ++dst) {
        const A* g = gathered(at<const T>(a.crops, n, c * a.K + k, dst, 0), a.crops.w, a.out_w,
                              rows.stage);
        for (int64_t x = 0; x < a.out_w; ++x) rows.work[x] += g[x];
      }
      std::fill(rows.sum, rows.sum + width, A(0));
      for (int64_t x = 0; x < a.out_w; ++x) rows.sum[rows.index[x]] += rows.work[x];
      A* grad = rows.grad + k * rows.width + box.x0;
      for (int64_t x = 0; x < width; ++x) grad[x] += rows.sum[x] * mask[x];
    }
  }
  for (int64_t k = 0; k < a.K; ++k)
    for (int64_t x = 0; x < a.W; ++x)
      store(*at<T>(a.image, n, k, y, x), rows.grad[k * rows.width + x]);
}

}  // namespace

void class_boxes_rows(const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1, Box* boxes,
                      void* scratch, int64_t* unknown) {
  with_element(a.element, [&](auto t) {
    boxes_rows<decltype(t)>(a, n, y0, y1, boxes, scratch, unknown);
  });
}

void class_crops_rows(const ClassCropsArgs& a, int64_t n, int64_t y0, int64_t y1, void* scratch) {
  with_element(a.element, [&](auto t) {
    const Rows<decltype(t)> rows(a, scratch);
    std::memset(rows.zero, 0, size_t(rows.width) * sizeof(*rows.zero));
    if (a.last)
      pixel_crops(a, n, y0, y1, rows);
    else
      for (int64_t c = 0; c < a.C; ++c) plane_crops(a, n, c, y0, y1, rows);
  });
  if (a.stream) stream_fence();
}

void class_crops_backward_row(const ClassCropsArgs& a, int64_t n, int64_t y, void* scratch) {
  with_element(a.element, [&](auto t) {
    backward_row(a, n, y, Rows<decltype(t)>(a, scratch));
  });
}

}  // namespace smis::SMIS_ISA
