// Rings of shared-memory buffers, each with a pair of mbarriers: `full`, at which the side that fills a buffer arrives, and `empty`,
// at which the side that reads it does.
#pragma once

#include "ptx.cuh"

namespace seal::sm90 {

// Position in a ring of kStages buffers.
template <int kStages>
struct RingIndex {
  int stage = 0;
  uint32_t phase = 0;
  SEAL_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The same from the number of steps made: one number serves all the rings that advance together, where registers are scarce.
template <int kStages>
SEAL_DEVICE int stage_of(int step) {
  return step % kStages;
}
template <int kStages>
SEAL_DEVICE uint32_t phase_of(int step) {
  return step / kStages % 2;
}

// The barriers of a ring, each completed by `arrivals` arrivals.
template <int kStages>
SEAL_DEVICE void barriers_init(uint64_t (&barriers)[kStages], uint32_t arrivals) {
  for (int i = 0; i < kStages; ++i) barrier_init(barriers + i, arrivals);
}

}  // namespace seal::sm90
