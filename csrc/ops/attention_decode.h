// The forward's other kernel: few queries over many keys (csrc/cuda/attention_decode.h).
#pragma once

#include "../cuda/attention.h"

#include <cstdint>

namespace seal {

// Runs the call with the split kernel where that is the better one and returns true; else does nothing. `max_length_q`: a bound on the
// queries of a sequence. Allocates its workspace from PyTorch on the current device; no sync.
bool attention_by_splits(const AttentionForwardParams& params, int64_t max_length_q);

}  // namespace seal
