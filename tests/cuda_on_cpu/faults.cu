// Small kernels with one fault each, which the emulation has to catch; 0 has none.
#include <stdexcept>

#include "common/cuda.h"

namespace smis::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
enum Fault : int64_t {
  kNone, kMissingBarrier, kWrongMask, kDivergentBarrier, kEndedLane, kBeyondShared, kBeyondTensor,
  kNoMemory, kRaceOfBlocks, kFullTable, kTooManyThreads, kGridTooLarge, kTooMuchShared,
  kNothingWritten, kUnchecked, kNoWait, kWrongStream, kMisaligned, kBeyondLocal, kLanesApart,
  kFaults
};

// Every block reverses its 64 elements through shared memory.
template <int fault> __global__ void reverse_kernel(const int32_t* x, int32_t* y, int64_t count) {
  extern __shared__ int32_t tile[];
  __shared__ unsigned sums[2];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, last = blockDim.x - 1;
  const int64_t i = thread_index();
  if (fault == kEndedLane && threadIdx.x == 5) return;
  tile[threadIdx.x + (fault == kBeyondShared ? 1 : 0)] = x[i + (fault == kBeyondTensor ? 1 : 0)];
  if (fault == kDivergentBarrier && warp == 0) __syncthreads();
  else if (fault != kMissingBarrier) __syncthreads();
  int32_t value = tile[last - int(threadIdx.x)];
  unsigned total = unsigned(value);
  const unsigned mask = fault == kWrongMask ? (lane < 16 ? 0x0000ffffu : 0xffff00ffu) : kWarp;
  if (fault == kLanesApart && lane == 7) __syncwarp();
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(mask, total, step);
  if (lane == 0) sums[warp] = total;
  __syncthreads();
  if (fault == kNoMemory) value = *reinterpret_cast<const volatile int32_t*>(int64_t(64) + i * 4);
  if (fault == kMisaligned)
    value = *reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(x) + 2);
  if (fault == kBeyondLocal) {
    int32_t local[4] = {0, 1, 2, 3};
    volatile int32_t* p = local;
    for (int k = 0; k <= 4; ++k) value += p[k];
  }
  y[fault == kRaceOfBlocks ? int64_t(threadIdx.x) : i] = value + int32_t(0 * (sums[0] + sums[1]));
}

__global__ void read_kernel(const int32_t* unknown, int32_t* y) {
  y[thread_index()] = unknown[thread_index()];
}

// Open addressing without an end: it never returns where all slots are taken.
__global__ void insert_kernel(int32_t* slots, int32_t capacity) {
  const int32_t key = int32_t(thread_index()) + 1;
  for (int32_t i = key % capacity;; i = (i + 1) % capacity) {
    const int32_t held = atomicCAS(slots + i, 0, key);
    if (held == 0 || held == key) return;
  }
}

template <int fault> void reverse(const Tensor& x, const Tensor& y, cudaStream_t stream) {
  const int64_t count = x.numel();
  reverse_kernel<fault><<<unsigned(count / 64), 64, 64 * sizeof(int32_t), stream>>>(
      static_cast<const int32_t*>(x.const_data_ptr()),
      static_cast<int32_t*>(y.mutable_data_ptr()), count);
  if (fault != kUnchecked) STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int fault = 0>
void reverse_with(int64_t wanted, const Tensor& x, const Tensor& y, cudaStream_t stream) {
  if (wanted == fault) return reverse<fault>(x, y, stream);
  if constexpr (fault + 1 < kFaults) reverse_with<fault + 1>(wanted, x, y, stream);
}

// x: 1-D int32, of a multiple of 64 elements.
Tensor faulty(const Tensor& x, int64_t fault) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* current = nullptr;
  aoti_torch_get_current_cuda_stream(x.get_device_index(), &current);
  const auto stream = static_cast<cudaStream_t>(current);
  Tensor y = torch::stable::empty({x.numel()}, ScalarType::Int, std::nullopt, x.device());
  auto* out = static_cast<int32_t*>(y.mutable_data_ptr());
  const auto* in = static_cast<const int32_t*>(x.const_data_ptr());
  if (fault == kFullTable) {
    STD_CUDA_CHECK(cudaMemsetAsync(out, 0, size_t(x.numel()) * 4, stream));
    insert_kernel<<<2, unsigned(x.numel()), 0, stream>>>(out, int32_t(x.numel()));
  } else if (fault == kTooManyThreads) {
    read_kernel<<<1, 1025, 0, stream>>>(in, out);
  } else if (fault == kGridTooLarge) {
    read_kernel<<<dim3(1, 65536), 32, 0, stream>>>(in, out);
  } else if (fault == kTooMuchShared) {
    read_kernel<<<1, 32, (48 << 10) + 4, stream>>>(in, out);
  } else if (fault == kNothingWritten) {
    const Tensor unknown = torch::stable::empty({64}, ScalarType::Int, std::nullopt, x.device());
    read_kernel<<<1, 64, 0, stream>>>(
        static_cast<const int32_t*>(unknown.const_data_ptr()), out);
  } else if (fault == kNoWait) {
    int32_t first = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&first, in, 4, cudaMemcpyDeviceToHost, stream));
    return y;
  } else {
    reverse_with(fault, x, y, fault == kWrongStream ? nullptr : stream);
    return y;
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

STABLE_TORCH_LIBRARY(smis_emulated_faults, m) { m.def("faulty(Tensor x, int fault) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(smis_emulated_faults, CUDA, m) { m.impl("faulty", TORCH_BOX(&faulty)); }

}  // namespace
}  // namespace smis::cuda
