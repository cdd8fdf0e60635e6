#include "dispatch.h"

#include <ATen/Context.h>

#include <cmath>

#include "checks.h"
#include "text.h"

#ifdef SEAL_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

namespace seal {

std::string why_not_cuda(std::string_view op, at::ScalarType dtype, int64_t head_dim, int64_t compute_capability) {
  if (compute_capability != 90) {
    return join("backend cuda needs a Hopper GPU (compute capability 9.0), got ", compute_capability / 10, ".", compute_capability % 10);
  }
  const bool half_precision = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (op == "rope") {
    return half_precision || dtype == at::kFloat ? "" : join("backend cuda rotates bfloat16, float16 and float32, got ", dtype);
  }
  if (!half_precision) return join("backend cuda takes bfloat16 and float16, got ", dtype);
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    return join("backend cuda takes a head_dim that is a multiple of 8 up to 256, got ", head_dim);
  }
  return "";
}

Runner::Runner(const c10::FunctionSchema& schema, Body body)
    : reader_(schema), body_(body), name_(schema.operator_name().name), deterministic_(schema.argumentIndexWithName("deterministic")) {
  name_.erase(0, name_.find("::") + 2);
}

bool Runner::runs_here(const Call& call) const {
#ifdef SEAL_WITH_CUDA
  if (!body_ || !call.q->is_cuda() || (call.backend != "auto" && call.backend != "cuda")) return false;
  const auto* device = at::cuda::getDeviceProperties(call.q->get_device());
  std::string reason = why_not_cuda(name_, call.q->scalar_type(), call.head_dim, device->major * 10 + device->minor);
  const float sigma = static_cast<float>(call.sigma);
  if (call.v && reason.empty() && !(sigma > 0 && std::isfinite(sigma)))
    reason = join("backend cuda takes a softmax_scale above 0 (in fp32), got ", call.sigma);
  if (call.blocks && reason.empty()) reason = "backend cuda takes no block lists, got blocks";
  if (reason.empty()) {
    if (call.sink) reason = "backend cuda takes no sink (seal_ops.attention composes it)";
    else if (call.gate) reason = "backend cuda takes no gate (seal_ops.attention composes it)";
    else if (call.softcap) reason = "backend cuda takes no softcap";
  }
  if (reason.empty()) return true;
  if (call.backend == "cuda") throw c10::ValueError(SEAL_HERE, join("seal::", name_, ": ", reason));
#endif
  return false;
}

void Runner::operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t first = stack->size() - reader_.arguments();
  if (deterministic_ && at::globalContext().deterministicAlgorithms()) (*stack)[first + *deterministic_] = true;
  Call call = reader_.read(*stack);
  check(call);
  if (runs_here(call)) {
    Outputs outputs = body_(call);
    stack->erase(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
    for (Tensor& output : outputs) stack->emplace_back(std::move(output));
    return;
  }
  std::call_once(looked_up_, [&] { portable_ = c10::Dispatcher::singleton().findSchemaOrThrow(("seal_portable::" + name_).c_str(), ""); });
  portable_->callBoxed(stack);
}

}  // namespace seal
