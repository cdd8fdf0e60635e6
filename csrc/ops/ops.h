// Bodies of the ops on the sm_90a kernels: allocate and launch for a call that check() has passed. One function an op; the
// outputs come in the order of the op's schema (csrc/schemas.inc, docs/ops.md).
#pragma once

#include <ATen/ATen.h>

#include <string_view>
#include <vector>

#include "call.h"

namespace seal {

using Outputs = std::vector<Tensor>;
using Body = Outputs (*)(const Call&);

Outputs attention(const Call& call);
Outputs attention_backward(const Call& call);
Outputs rope(const Call& call);
Outputs rope_attention(const Call& call);

}  // namespace seal
