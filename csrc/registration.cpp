// Every schema of the library in one block, its kernels by dispatch key, and the pybind11 module `_C` with the facts of this
// build. The schemas themselves stand in schemas.inc, which the pure-Python build reads too. A new op is a line there and,
// where it has a kernel of its own, a line in body_of().
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

#ifdef SEAL_WITH_CUDA
#include <cuda.h>

#include "cuda/launch_overrides.h"
#endif

namespace {

const char* const kSchemas =
#include "schemas.inc"
    ;

// One schema a line.
std::vector<std::string> schemas() {
  std::vector<std::string> found;
  const std::string text(kSchemas);
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    if (end > begin) found.push_back(text.substr(begin, end - begin));
  }
  return found;
}

// The op's kernel in this build, or null.
seal::Body body_of([[maybe_unused]] const std::string& op) {
#ifdef SEAL_WITH_CUDA
  if (op == "attention") return &seal::attention;
  if (op == "attention_backward") return &seal::attention_backward;
  if (op == "rope") return &seal::rope;
  if (op == "rope_attention") return &seal::rope_attention;
#endif
  return nullptr;
}

template <typename Kernel, typename... Arguments>
void implement(torch::Library& m, const std::string& op, Arguments... arguments) {
  const auto& schema = c10::Dispatcher::singleton().findSchemaOrThrow(("seal::" + op).c_str(), "").schema();
  m.impl(op.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(schema, arguments...)));
}

// Ops on lists of tensors have no kernels here: seal_ops/ops/merging.py gives them their checks, bodies and differentiation.
template <typename Function>
void for_each_op(const Function& function) {
  for (const auto& schema : schemas())
    if (schema.find("Tensor[]") == std::string::npos) function(schema.substr(0, schema.find('(')));
}

}  // namespace

TORCH_LIBRARY(seal, m) {
  for (const auto& schema : schemas()) m.def(schema.c_str());
}

// What serves a tensor without these kernels (ATen, Triton, the oracle): seal_ops/ops/registration.py gives the bodies.
TORCH_LIBRARY(seal_portable, m) {
  for (const auto& schema : schemas()) m.def(schema.c_str());
}

TORCH_LIBRARY_IMPL(seal, CPU, m) {
  for_each_op([&](const std::string& op) { implement<seal::Runner>(m, op, body_of(op)); });
}

TORCH_LIBRARY_IMPL(seal, CUDA, m) {
  for_each_op([&](const std::string& op) { implement<seal::Runner>(m, op, body_of(op)); });
}

TORCH_LIBRARY_IMPL(seal, Autograd, m) {
  for_each_op([&](const std::string& op) { implement<seal::Differentiator>(m, op); });
}

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
  m.def("why_not_cuda", [](const std::string& op, pybind11::object dtype, int64_t head_dim, int64_t capability) {
    const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
    return seal::why_not_cuda(op, type, head_dim, capability);
  }, "why the sm_90a kernels cannot run this, in one sentence; empty where they can");
#ifdef SEAL_WITH_CUDA
  m.def("set_launch_overrides", [](int32_t enough_ctas, int32_t sms) { seal::launch_overrides() = {sms, enough_ctas}; },
        pybind11::kw_only(), pybind11::arg("enough_ctas") = 0, pybind11::arg("sms") = 0,
        "for tests and memory plans: lets small shapes take the paths of large ones; without arguments the device decides again");
#endif
}
