// Four pixels are compared bit by bit as one of them is taken; rows of planes are transposed on the way.
#include "upsampling_source/cpu_kernel.h"

#include <type_traits>

#include "common/transposed.h"

namespace smis::SMIS_ISA {
namespace {

template <class A> using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

template <class A> Bits<A> bits(const A& value) {
  Bits<A> found;
  std::memcpy(&found, &value, sizeof(found));
  return found;
}

// Whether `count` values, each `next` after the last, are alike at the four places.
template <int64_t next, class A>
bool taken(const A* top, const A* bottom, int64_t right, A* to, int64_t count) {
  Bits<A> differs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const A value = top[next * i];
    const Bits<A> own = bits(value);
    differs |= (own ^ bits(top[next * i + right])) | (own ^ bits(bottom[next * i])) |
               (own ^ bits(bottom[next * i + right]));
    to[i] = value;
  }
  return differs == 0;
}

template <class A> bool row_of_pixels(const UpsamplingSourceArgs& a, const A* top, A* to) {
  const A* bottom = top + 2 * a.W * a.step;
  for (int64_t x = 0; x < a.W; ++x, top += 2 * a.step, bottom += 2 * a.step, to += a.C)
    if (!taken<1>(top, bottom, a.step, to, a.C)) return false;
  return true;
}

template <class A> bool row_of_planes(const UpsamplingSourceArgs& a, const A* top, A* to) {
  constexpr int64_t kChannels = kVectorBytes / sizeof(A), kPixels = 128;
  alignas(kVectorBytes) A kept[kChannels * kPixels];
  for (int64_t x = 0; x < a.W; x += kPixels)
    for (int64_t c = 0; c < a.C; c += kChannels) {
      const int64_t pixels = std::min(kPixels, a.W - x), channels = std::min(kChannels, a.C - c);
      for (int64_t i = 0; i < channels; ++i) {
        const A* plane = top + (c + i) * a.step + 2 * x;
        if (!taken<2>(plane, plane + 2 * a.W, 1, kept + i * kPixels, pixels)) return false;
      }
      const auto pixel = [&](int64_t p) { return to + (x + p) * a.C + c; };
      if (channels == kChannels) {
        transposed<A>(kept, kPixels, channels, pixels, pixel);
      } else {
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t i = 0; i < channels; ++i) pixel(p)[i] = kept[i * kPixels + p];
      }
    }
  return true;
}

template <class A> void rows(const UpsamplingSourceArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (a.differs->load(std::memory_order_relaxed)) return;
    const int64_t image = item / a.H, y = item % a.H;
    const A* top = static_cast<const A*>(a.from) + image * a.batch_step + 4 * y * a.W * (a.last ? a.step : 1);
    A* to = static_cast<A*>(a.to) + item * a.W * a.C;
    if (!(a.last ? row_of_pixels(a, top, to) : row_of_planes(a, top, to)))
      a.differs->store(true, std::memory_order_relaxed);
  }
}

}  // namespace

void upsampling_source_kernel(const UpsamplingSourceArgs& a, int64_t begin, int64_t end) {
  if (a.wide) rows<double>(a, begin, end);
  else rows<float>(a, begin, end);
}

}  // namespace smis::SMIS_ISA
