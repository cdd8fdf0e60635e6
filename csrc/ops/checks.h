// The contract of the ops (docs/ops.md) as checks, one sentence each: op, argument, what was expected, what came. They run
// before every body in a build with the C++ extension, on every device; seal_ops/ops/checks.py says the same sentences where
// there is no extension and while a call is traced. One table of tests holds both to it.
#pragma once

#include "call.h"

namespace seal {

// Raises ValueError for a call outside the contract; else fills in what Call derives.
void check(Call& call);

}  // namespace seal
