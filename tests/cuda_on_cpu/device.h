// CUDA's device side on the CPU: a thread is a fiber, warps' collectives and blocks' barriers are
// rendezvous. Host types come from the toolkit's own headers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

// Not instrumented by -fsanitize=thread: its accesses are not the kernel's.
#define EMULATED __attribute__((no_sanitize("thread")))

namespace emulated {

// The built-in variables: set at every switch of fibers.
extern uint3 thread_idx, block_idx;
extern dim3 block_dim, grid_dim;

// Bounds of a grid in common/cuda.h, lowered so that loops over the rest of a grid run.
int64_t grid_limit(int axis, int64_t limit);

struct Config {
  Config(dim3 g, dim3 b, size_t s = 0, cudaStream_t t = nullptr)
      : grid(g), block(b), shared(s), stream(t) {}
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// A call in the source: what messages name, and what lanes that meet have to share.
struct Site {
  const char* name;
  int line;
};

enum class Kind { exchange, ballot, match, max, min, add, sync };

void run(const Config&, Site, void* arguments, size_t bytes, void (*thread)(void*));
uint64_t collective(Kind, Site, unsigned mask, uint64_t value = 0, int source = 0);
int barrier(Site, int predicate);  // the predicates' sum
int lane();
void* shared_memory(const void* key, size_t bytes);  // key nullptr: the dynamic part
void before_atomic(const volatile void*, size_t bytes, const void* pc);

template <class Kernel, class... Arguments>
EMULATED void launch(const Config& config, Site site, Kernel kernel, const Arguments&... arguments) {
  using Held = std::pair<Kernel, std::tuple<Arguments...>>;
  Held held(kernel, std::tuple<Arguments...>(arguments...));
  run(config, site, &held, sizeof(held), [](void* p) EMULATED {
    auto* h = static_cast<Held*>(p);
    std::apply(h->first, h->second);
  });
}

template <class T> EMULATED T* dynamic_shared() { return static_cast<T*>(shared_memory(nullptr, 0)); }
// A variable for each type of Tag: a lambda is a type of its own in every instantiation.
template <class T, class Tag> EMULATED T& static_shared(Tag) {
  static const char key = 0;
  return *static_cast<T*>(shared_memory(&key, sizeof(T)));
}

template <class T> EMULATED uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8, "collectives take at most 8 bytes");
  uint64_t u = 0;
  __builtin_memcpy(&u, &v, sizeof(T));
  return u;
}
template <class T> EMULATED T from_bits(uint64_t u) {
  T v;
  __builtin_memcpy(&v, &u, sizeof(T));
  return v;
}
template <class T>
EMULATED T exchange(Site site, unsigned mask, T v, int source, bool inside) {
  return from_bits<T>(collective(Kind::exchange, site, mask, bits(v), inside ? source : lane()));
}
template <class T> EMULATED T reduce(Kind kind, Site site, unsigned mask, T v) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "CUDA reduces these only");
  return T(collective(kind, site, mask, uint64_t(int64_t(v))));
}
template <class T, class... Types> constexpr bool any_of = (std::is_same_v<T, Types> || ...);
using u64 = unsigned long long;

// Each is one function, whose caller's address names it in reports.
template <class T, class F> EMULATED __attribute__((noinline)) T atomic(T* p, F&& next) {
  before_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = next(old);
  return old;
}
template <class T> struct Same { using type = T; };
template <class T> using same = typename Same<T>::type;

}  // namespace emulated

#define threadIdx (::emulated::thread_idx)
#define blockIdx (::emulated::block_idx)
#define blockDim (::emulated::block_dim)
#define gridDim (::emulated::grid_dim)

#define EMULATED_AT int line = __builtin_LINE()
#define EMULATED_HERE ::emulated::Site{__func__, line}
#define EMULATED_INLINE EMULATED inline __attribute__((always_inline))

template <class T>
EMULATED T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMULATED_AT) {
  const int first = ::emulated::lane() & ~(width - 1);
  return ::emulated::exchange(EMULATED_HERE, mask, v, first | (source & (width - 1)), true);
}
template <class T>
EMULATED T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATED_AT) {
  const int source = ::emulated::lane() - int(delta);
  return ::emulated::exchange(EMULATED_HERE, mask, v, source,
                              source >= (::emulated::lane() & ~(width - 1)));
}
template <class T>
EMULATED T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATED_AT) {
  const int source = ::emulated::lane() + int(delta);
  return ::emulated::exchange(EMULATED_HERE, mask, v, source,
                              source < (::emulated::lane() & ~(width - 1)) + width);
}
template <class T>
EMULATED T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, EMULATED_AT) {
  const int source = ::emulated::lane() ^ lanes;
  return ::emulated::exchange(EMULATED_HERE, mask, v, source,
                              source < (::emulated::lane() & ~(width - 1)) + width);
}
EMULATED inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_AT) {
  return unsigned(::emulated::collective(::emulated::Kind::ballot, EMULATED_HERE, mask, p != 0));
}
EMULATED inline int __any_sync(unsigned mask, int p, EMULATED_AT) {
  return ::emulated::collective(::emulated::Kind::ballot, EMULATED_HERE, mask, p != 0) != 0;
}
EMULATED inline int __all_sync(unsigned mask, int p, EMULATED_AT) {
  return ::emulated::collective(::emulated::Kind::ballot, EMULATED_HERE, mask, p == 0) == 0;
}
template <class T> EMULATED unsigned __match_any_sync(unsigned mask, T v, EMULATED_AT) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA matches 4 or 8 bytes");
  return unsigned(::emulated::collective(::emulated::Kind::match, EMULATED_HERE, mask,
                                         ::emulated::bits(v)));
}
template <class T> EMULATED T __reduce_max_sync(unsigned mask, T v, EMULATED_AT) {
  return ::emulated::reduce(::emulated::Kind::max, EMULATED_HERE, mask, v);
}
template <class T> EMULATED T __reduce_min_sync(unsigned mask, T v, EMULATED_AT) {
  return ::emulated::reduce(::emulated::Kind::min, EMULATED_HERE, mask, v);
}
template <class T> EMULATED T __reduce_add_sync(unsigned mask, T v, EMULATED_AT) {
  return ::emulated::reduce(::emulated::Kind::add, EMULATED_HERE, mask, v);
}
EMULATED inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_AT) {
  ::emulated::collective(::emulated::Kind::sync, EMULATED_HERE, mask);
}
EMULATED inline void __syncthreads(EMULATED_AT) { ::emulated::barrier(EMULATED_HERE, 0); }
EMULATED inline int __syncthreads_count(int p, EMULATED_AT) {
  return ::emulated::barrier(EMULATED_HERE, p != 0);
}
EMULATED inline int __syncthreads_or(int p, EMULATED_AT) {
  return ::emulated::barrier(EMULATED_HERE, p != 0) != 0;
}
EMULATED inline int __syncthreads_and(int p, EMULATED_AT) {
  return ::emulated::barrier(EMULATED_HERE, p == 0) == 0;
}

inline void __stwb(uint4* p, uint4 v) { *p = v; }  // checked as the kernel's

EMULATED inline int __popc(unsigned v) { return __builtin_popcount(v); }
EMULATED inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
EMULATED inline int __ffs(int v) { return __builtin_ffs(v); }
EMULATED inline unsigned __float_as_uint(float v) {
  return ::emulated::from_bits<unsigned>(::emulated::bits(v));
}
EMULATED inline long long __double_as_longlong(double v) {
  return ::emulated::from_bits<long long>(::emulated::bits(v));
}
EMULATED inline int max(int a, int b) { return a > b ? a : b; }
EMULATED inline int min(int a, int b) { return a < b ? a : b; }

// CUDA has each atomic operation for these types only.
#define EMULATED_ATOMIC(name, expression, ...)                                            \
  template <class T> EMULATED_INLINE T name(T* p, ::emulated::same<T> v) {                 \
    static_assert(::emulated::any_of<T, __VA_ARGS__>, "CUDA has no " #name " of this type"); \
    return ::emulated::atomic(p, [=](T old) EMULATED -> T { return expression; });           \
  }
EMULATED_ATOMIC(atomicAdd, old + v, int, unsigned, ::emulated::u64, float, double)
EMULATED_ATOMIC(atomicMax, old < v ? v : old, int, unsigned, long long, ::emulated::u64)
EMULATED_ATOMIC(atomicMin, v < old ? v : old, int, unsigned, long long, ::emulated::u64)
EMULATED_ATOMIC(atomicExch, (void(old), v), int, unsigned, ::emulated::u64, float)
EMULATED_ATOMIC(atomicOr, old | v, int, unsigned, ::emulated::u64)
EMULATED_ATOMIC(atomicAnd, old & v, int, unsigned, ::emulated::u64)
template <class T>
EMULATED_INLINE T atomicCAS(T* p, ::emulated::same<T> compare, ::emulated::same<T> v) {
  static_assert(::emulated::any_of<T, int, unsigned, ::emulated::u64, unsigned short>,
                "CUDA has no atomicCAS of this type");
  return ::emulated::atomic(p, [=](T old) EMULATED -> T { return old == compare ? v : old; });
}
