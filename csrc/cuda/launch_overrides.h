// What the launches assume of the device, settable by tests and memory plans: with few multiprocessors small shapes take the paths of
// large ones (several tiles to a thread block, whole groups of query heads in one). Results stay the same up to the order of sums.
#pragma once

#include <cstdint>

namespace seal {

struct LaunchOverrides {
  int32_t multiprocessors = 0;  // thread blocks of a persistent grid; 0: as many as the device has multiprocessors
  int32_t enough_ctas = 0;      // attention_backward.h
};

// One for the process; the ops read it at every call. Not to be changed while other threads launch.
inline LaunchOverrides& launch_overrides() {
  static LaunchOverrides overrides;
  return overrides;
}

}  // namespace seal
