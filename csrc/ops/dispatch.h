// What runs a seal:: op on real tensors: the checks, then a body of the kernels' own or the portable one.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "call.h"
#include "ops.h"

namespace seal {

// Why the sm_90a kernels cannot run `op` on such tensors, in one sentence; empty where they can. The one predicate both for
// choosing the backend and for refusing a forced one. `compute_capability` is major * 10 + minor.
std::string why_not_cuda(std::string_view op, at::ScalarType dtype, int64_t head_dim, int64_t compute_capability);

// Boxed kernel of one op for CPU and CUDA tensors. `body` is null where the op has no kernel in this build; what it cannot
// run goes to seal_portable::<op> (Python: Triton, ATen, the oracle). Boxed, so that one class serves every schema.
class Runner : public c10::OperatorKernel {
 public:
  Runner(const c10::FunctionSchema& schema, Body body);
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

 private:
  bool runs_here(const Call& call) const;

  CallReader reader_;
  Body body_;
  std::string name_;
  std::optional<int32_t> deterministic_;  // the argument's place, where the op has it
  std::once_flag looked_up_;  // backwards of several devices run in threads of their own
  std::optional<c10::OperatorHandle> portable_;  // looked up at the first call
};

}  // namespace seal
