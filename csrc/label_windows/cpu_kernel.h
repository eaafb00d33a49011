// Keys of per-pixel conditioning vectors.
#pragma once
#include "common/isa.h"

namespace smis {

struct VectorKeysArgs {
  Element element = Element::f32;
  const void* data = nullptr;
  int64_t N = 0, K = 0, P = 0;                    // P: pixels of an image
  int64_t stride_n = 0, stride_k = 0, stride_p = 0;
  bool exact = false;     // keys of 0/1 vectors with at most two ones; else a hash to be verified
  uint64_t* keys = nullptr;  // (N, P)
  // One flag per chunk of kKeyChunk pixels: 1 where the exact key does not hold, 2 where NaN is met.
  uint8_t* flags = nullptr;
  // Verification: the symbol of every pixel and the vectors (symbols, K) as doubles.
  const int32_t* symbols = nullptr;
  const double* vectors = nullptr;
};

constexpr int64_t kKeyChunk = 512;

}  // namespace smis

// begin..end counts chunks of pixels of all images: (n, chunk).
SMIS_DECLARE_KERNEL(vector_keys_kernel, const VectorKeysArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(verify_vectors_kernel, const VectorKeysArgs&, int64_t begin, int64_t end)
