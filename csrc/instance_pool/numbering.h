// Ids to numbers from 0 in order of first appearance, and their pixels: open addressing, growing.
#pragma once
#include "common/host.h"

namespace smis {

class Numbering {
 public:
  explicit Numbering(const Tensor& like, int64_t expected = 128) : like_(like) {
    int64_t capacity = 256;
    while (capacity < 2 * expected) capacity *= 2;
    resize(capacity);
  }

  int32_t operator()(int32_t id, int32_t pixels) {
    uint64_t* slot = find(id);
    if (*slot == 0) {
      if (2 * (count_ + 1) > capacity_) {
        resize(2 * capacity_);
        slot = find(id);
      }
      ids_[count_] = id;
      pixels_[count_] = 0;
      *slot = entry(id, ++count_);
    }
    const auto number = int32_t(*slot & 0xffffffffu) - 1;
    pixels_[number] += pixels;
    return number;
  }

  void clear() {
    if (count_ > 0) std::fill(slots_, slots_ + capacity_, uint64_t(0));
    count_ = 0;
  }

  int64_t count() const { return count_; }

  // Ids, then pixels, to 2 * count() integers.
  void list(int32_t* to) const {
    std::copy(ids_, ids_ + count_, to);
    std::copy(pixels_, pixels_ + count_, to + count_);
  }

 private:
  // An id above its number from 1; 0 is an empty slot.
  static uint64_t entry(int32_t id, int64_t number) {
    return uint64_t(id) << 32 | uint64_t(number);
  }

  uint64_t* find(int32_t id) {
    uint64_t i = uint64_t(id) * 0x9E3779B97F4A7C15ull >> shift_;
    while (slots_[i] != 0 && int32_t(slots_[i] >> 32) != id) i = (i + 1) & uint64_t(capacity_ - 1);
    return slots_ + i;
  }

  void resize(int64_t capacity) {
    const Tensor old = memory_;
    const int32_t *ids = ids_, *pixels = pixels_;
    capacity_ = capacity;
    for (shift_ = 64; capacity > 1; capacity /= 2) --shift_;
    // A slot of 8 bytes, and for half as many numbers an id and a count of 4.
    memory_ = empty_of(like_, {3 * capacity_ / 2}, ScalarType::Long);
    slots_ = static_cast<uint64_t*>(memory_.mutable_data_ptr());
    ids_ = reinterpret_cast<int32_t*>(slots_ + capacity_);
    pixels_ = ids_ + capacity_ / 2;
    std::fill(slots_, slots_ + capacity_, uint64_t(0));
    std::copy(ids, ids + count_, ids_);
    std::copy(pixels, pixels + count_, pixels_);
    for (int64_t i = 0; i < count_; ++i) *find(ids_[i]) = entry(ids_[i], i + 1);
  }

  Tensor like_, memory_;
  uint64_t* slots_ = nullptr;                   // [capacity]
  int32_t *ids_ = nullptr, *pixels_ = nullptr;  // [capacity / 2]
  int64_t capacity_ = 0, count_ = 0;
  int shift_ = 64;
};

}  // namespace smis
