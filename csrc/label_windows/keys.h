// Keys of the numberings: an exact one for three ids side by side, a hash for vectors.
#pragma once
#include "common/isa.h"

namespace smis {

constexpr int kIdBits = 21;  // three ids and one bit more fill a key
constexpr int64_t kMaxIds = (int64_t(1) << kIdBits) - 1;
constexpr uint64_t kHashSeed = 0x243F6A8885A308D3ull;
constexpr uint64_t kHashFactor = 0x9E3779B97F4A7C15ull;

namespace {

// Never 0, which marks an empty slot.
SMIS_HOST_DEVICE inline uint64_t triple(int32_t a, int32_t b, int32_t c) {
  return 1ull << 63 | uint64_t(a) << (2 * kIdBits) | uint64_t(b) << kIdBits | uint64_t(c);
}

SMIS_HOST_DEVICE inline uint64_t mix(uint64_t h, uint64_t v) {
  h = (h ^ v) * kHashFactor;
  return h ^ (h >> 29);
}

}  // namespace
}  // namespace smis
