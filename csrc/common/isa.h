// One kernel source, several instruction sets: cpu_kernel.cpp files are compiled once per set,
// each time with SMIS_ISA naming the namespace, and the best one is chosen at run time.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#define SMIS_HOST_DEVICE __host__ __device__
#else
#define SMIS_HOST_DEVICE
#endif

namespace smis {

enum class Isa { baseline, avx2, avx512 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

// The set of every kernel, the same for the whole process: the best, or the one SMIS_ISA names.
inline Isa chosen_isa() {
  static const Isa chosen = [] {
    const int best = int(best_isa());
    const char* wanted = std::getenv("SMIS_ISA");
    if (!wanted || !*wanted) return Isa(best);
    std::string known;
    for (int i = 0; i <= best; ++i) {
      if (std::string(wanted) == kIsaNames[i]) return Isa(i);
      known += std::string(i ? ", " : "") + kIsaNames[i];
    }
    throw std::runtime_error("SMIS_ISA: expected one of " + known + " on this processor; got '" +
                             wanted + "'");
  }();
  return chosen;
}

// Element types as the kernels see them: no torch header in a file that is compiled per set.
enum class Element : int32_t { f32, f64, f16, bf16 };

}  // namespace smis

// Declares `void name(args)` for every instruction set and `name##_best()`, the one to call.
#if defined(__x86_64__)
#define SMIS_DECLARE_KERNEL(name, ...)                   \
  namespace smis::baseline { void name(__VA_ARGS__); }   \
  namespace smis::avx2 { void name(__VA_ARGS__); }       \
  namespace smis::avx512 { void name(__VA_ARGS__); }     \
  namespace smis {                                       \
  inline auto name##_best() {                            \
    switch (chosen_isa()) {                               \
      case Isa::avx512: return &avx512::name;            \
      case Isa::avx2: return &avx2::name;                \
      default: return &baseline::name;                   \
    }                                                    \
  }                                                      \
  }
#else
#define SMIS_DECLARE_KERNEL(name, ...)                   \
  namespace smis::baseline { void name(__VA_ARGS__); }   \
  namespace smis {                                       \
  inline auto name##_best() { return &baseline::name; }  \
  }
#endif
