// The ids of instances; shared by the CPU and the CUDA launchers.
#pragma once
#include "common/host.h"

namespace smis {

constexpr int64_t kMaxId = 0x7fffffff;

// `unknown` is an id out of range, 0 where there is none.
inline void check_ids(int64_t unknown) {
  if (unknown != 0)
    refuse("instance_map: expected ids 0..", kMaxId, ", got ", unknown,
           "; renumber the instances first");
}

}  // namespace smis
