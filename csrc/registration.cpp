// Every schema of the library in one block, the CUDA bodies where they were built, and the pybind11 module `_C`
// with the facts of this build. The schemas themselves stand in schemas.inc, which the pure-Python build reads too.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <string>
#include <vector>

#include "ops/ops.h"

#ifdef SEAL_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <cuda.h>

#include "cuda/launch_overrides.h"
#endif

namespace {

const char* const kSchemas =
#include "schemas.inc"
    ;
const std::string kBackendArgument = ", str backend=\"auto\"";

// One schema a line; `with_backend` keeps their last argument, the choice of a backend.
std::vector<std::string> schemas(bool with_backend) {
  std::vector<std::string> found;
  const std::string text(kSchemas);
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    if (end == begin) continue;
    std::string schema = text.substr(begin, end - begin);
    const size_t argument = schema.find(kBackendArgument);
    TORCH_INTERNAL_ASSERT(argument != std::string::npos, schema);
    if (!with_backend) schema.erase(argument, kBackendArgument.size());
    found.push_back(std::move(schema));
  }
  return found;
}

}  // namespace

TORCH_LIBRARY(seal, m) {
  for (const auto& schema : schemas(true)) m.def(schema.c_str());
}

#ifdef SEAL_WITH_CUDA

// The sm_90a kernels' own ops: no choice of a backend, no fallback.
TORCH_LIBRARY(seal_cuda, m) {
  for (const auto& schema : schemas(false)) m.def(schema.c_str());
}

TORCH_LIBRARY_IMPL(seal_cuda, CUDA, m) {
  m.impl("attention", &seal::attention);
  m.impl("attention_backward", &seal::attention_backward);
  m.impl("rope", &seal::rope);
  m.impl("rope_attention", &seal::rope_attention);
}

// What serves a CUDA tensor without these kernels (Triton, the oracle): seal_ops/ops/registration.py registers the bodies.
TORCH_LIBRARY(seal_portable, m) {
  for (const auto& schema : schemas(true)) m.def(schema.c_str());
}

namespace {

// Body of every seal:: op for CUDA tensors: ours where it can run and is not ruled out, else the portable one.
// Boxed, so that one function serves all ops; it costs about a microsecond.
void run_on_cuda(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(std::string("seal::").size());
  const auto arguments = schema.arguments().size();
  const auto& q = torch::jit::peek(*stack, *schema.argumentIndexWithName("q"), arguments).toTensor();
  const std::string backend = stack->back().toStringRef();
  bool ours = false;
  if ((backend == "auto" || backend == "cuda") && q.is_cuda() && q.dim() > 0) {
    const auto* device = at::cuda::getDeviceProperties(q.get_device());
    const std::string reason =
        seal::why_not_cuda(name, q.scalar_type(), q.size(-1), device->major * 10 + device->minor);
    TORCH_CHECK_VALUE(reason.empty() || backend == "auto", "seal::", name, ": ", reason);
    ours = reason.empty();
  }
  if (ours) stack->pop_back();
  c10::Dispatcher::singleton()
      .findSchemaOrThrow(((ours ? "seal_cuda::" : "seal_portable::") + name).c_str(), "")
      .callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(seal, CUDA, m) {
  for (const auto& schema : schemas(true))
    m.impl(schema.substr(0, schema.find('(')).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cuda>());
}

#endif  // SEAL_WITH_CUDA

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of this build of seal_ops; importing it registers torch.ops.seal.*";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["torch"] = TORCH_VERSION;
    facts["compiler"] = __VERSION__;
#ifdef SEAL_WITH_CUDA
    facts["cuda"] = CUDA_VERSION;
    facts["architectures"] = SEAL_CUDA_ARCHITECTURES;
#else
    facts["cuda"] = pybind11::none();
#endif
    return facts;
  }, "torch, compiler and CUDA that this extension was built with");
#ifdef SEAL_WITH_CUDA
  m.def("why_not_cuda", [](const std::string& op, pybind11::object dtype, int64_t head_dim, int64_t capability) {
    const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
    return seal::why_not_cuda(op, type, head_dim, capability);
  }, "why the sm_90a kernels cannot run this, in one sentence; empty where they can");
  m.def("set_launch_overrides", [](int32_t enough_ctas, int32_t sms) { seal::launch_overrides() = {sms, enough_ctas}; },
        pybind11::kw_only(), pybind11::arg("enough_ctas") = 0, pybind11::arg("sms") = 0,
        "for tests: lets small shapes take the paths of large ones; without arguments the device decides again");
#endif
}
