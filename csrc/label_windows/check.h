// What is asked of the ids of a map; shared by the CPU and the CUDA launchers.
#pragma once
#include "common/tensor.h"
#include "label_windows/keys.h"

namespace smis {

// `least` is the least id of a map, or any that is below 1. 0 would pass for the outside.
inline void check_window_id(int64_t least) {
  if (least < 1)
    refuse("map: expected ids from 1, got ", least,
           "; 0 stands for the pixels outside the image: number from 1");
}

}  // namespace smis
