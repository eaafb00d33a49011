// What every cuda.cu needs: device guard and current stream, launches that name their op, grid
// arithmetic, warps, element types.
#pragma once
#ifndef USE_CUDA
#error "compile cuda.cu with -DUSE_CUDA: torch declares its stream functions only then"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "host.h"

namespace smis::cuda {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;  // all lanes
constexpr int kLane = 31;                // threadIdx.x & kLane is the lane

// Makes the tensor's device current for a scope; `stream` is the one that torch launches on.
class Launch {
 public:
  Launch(const Tensor& t, const char* op) : op_(op), guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  // After every launch, copy and memset: a refusal names the op.
  void check(cudaError_t status = cudaGetLastError()) const {
    if (status == cudaSuccess) return;
    refuse(op_, ": expected the GPU to take its work, got CUDA error ", int(status), ", ",
           cudaGetErrorString(status), "; run again with CUDA_LAUNCH_BLOCKING=1 to see whether "
           "an earlier kernel failed, or take backend=\"reference\"");
  }
  void clear(void* memory, int64_t bytes) const {
    check(cudaMemsetAsync(memory, 0, size_t(bytes), stream));
  }
  // Waits for the device.
  template <class T> void fetch(T* host, const void* device) const {
    check(cudaMemcpyAsync(host, device, sizeof(T), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
  }
  cudaStream_t stream = nullptr;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of kThreads along x for `count` items, and rows along y; kernels stride over the rest.
inline dim3 grid(int64_t count, int64_t rows = 1) {
  return dim3(unsigned(std::clamp<int64_t>(ceil_div(count, kThreads), 1, 1 << 20)),
              unsigned(std::clamp<int64_t>(rows, 1, 65535)));
}

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t thread_stride() { return int64_t(gridDim.x) * blockDim.x; }

// Division by a number that a launch fixes: below 2^31 by a product and a shift.
template <class I> struct Divider {
  I by = 1;
  Divider(int64_t divisor = 1) : by(I(divisor)) {}
  __device__ I operator()(I n) const { return n / by; }
};
template <> struct Divider<int32_t> {
  uint32_t factor = 1, shift = 0;
  Divider(int64_t divisor = 1) {
    while (int64_t(1) << shift < divisor) ++shift;
    factor = uint32_t((((int64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ int32_t operator()(int32_t n) const {
    return int32_t((uint32_t(uint64_t(uint32_t(n)) * factor >> 32) + uint32_t(n)) >> shift);
  }
};
// The quotient; n becomes the remainder.
template <class I> __device__ inline I split(I& n, const Divider<I>& divide, I divisor) {
  const I quotient = divide(n);
  n -= quotient * divisor;
  return quotient;
}

// What another thread may be writing.
template <class T> __device__ T now(const T& v) { return *const_cast<const volatile T*>(&v); }

// The largest value of the lanes of `mask`, which all call it.
__device__ inline int32_t warp_max(unsigned mask, int32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  int32_t largest = value;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int32_t other = __shfl_sync(mask, value, __ffs(int(left)) - 1);
    largest = other > largest ? other : largest;
  }
  return largest;
#else
  return __reduce_max_sync(mask, value);
#endif
}

// fp32 arithmetic for storage in fp32, fp16 and bf16; fp64 for fp64.
template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

__device__ inline float load(float v) { return v; }
__device__ inline double load(double v) { return v; }
__device__ inline float load(__half v) { return __half2float(v); }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> __device__ inline T rounded(Acc<T> v) { return v; }
template <> __device__ inline __half rounded<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// V elements that move as one transaction.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
// One store of 16 bytes: of a struct whose elements come from branches each would be stored apart.
template <class T, int V> __device__ inline void store_whole(T* p, const Pack<T, V>& pack) {
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, 16);
    __stwb(reinterpret_cast<uint4*>(p), bits);
  } else {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  }
}

// Calls fn(T{}) with the storage type that `e` names.
template <class F> void with_element(Element e, F&& fn) {
  switch (e) {
    case Element::f32: return fn(float{});
    case Element::f64: return fn(double{});
    case Element::f16: return fn(__half{});
    case Element::bf16: return fn(__nv_bfloat16{});
  }
}

}  // namespace smis::cuda
