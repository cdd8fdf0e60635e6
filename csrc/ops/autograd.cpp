#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>
#include <vector>

#include "text.h"

namespace seal {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;

// One call on its way below autograd: its arguments by name until run(), which leaves the outputs in their place.
struct Inner {
  const c10::OperatorHandle& op;
  c10::DispatchKeySet keys;
  Stack* stack;

  const IValue& operator[](const char* name) const {
    const auto& schema = op.schema();
    return stack->at(stack->size() - schema.arguments().size() + *schema.argumentIndexWithName(name));
  }
  // Undefined where it is None or the op has no such argument.
  Tensor tensor(const char* name) const {
    if (!op.schema().argumentIndexWithName(name)) return Tensor();
    const IValue& value = (*this)[name];
    return value.isTensor() ? value.toTensor() : Tensor();
  }
  variable_list run() const {
    at::AutoDispatchBelowAutograd guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    variable_list outputs;
    for (const IValue& output : torch::jit::last(*stack, op.schema().returns().size())) outputs.push_back(output.toTensor());
    return outputs;
  }
};

IValue optional(const Tensor& t) { return t.defined() ? IValue(t) : IValue(); }

using Named = std::vector<std::pair<const char*, IValue>>;

// Calls an op with arguments by name, then those saved by a forward; what neither holds takes its default.
variable_list call(const char* name, const Named& named, const AutogradContext* ctx) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  Stack stack;
  for (const auto& argument : op.schema().arguments()) {
    const IValue* found = argument.default_value() ? &*argument.default_value() : nullptr;
    if (const auto saved = ctx->saved_data.find(argument.name()); saved != ctx->saved_data.end()) found = &saved->second;
    for (const auto& [given, value] : named)
      if (argument.name() == given) found = &value;
    stack.push_back(found ? *found : IValue());
  }
  op.callBoxed(stack);
  variable_list outputs;
  for (IValue& output : stack) outputs.push_back(std::move(output).toTensor());
  return outputs;
}

// attention and rope_attention.
struct Attention : Function<Attention> {
  static constexpr const char* kDifferentiable[] = {"q", "k", "v", "scale", "offset", "sink", "gate"};
  static constexpr const char* kRead[] = {"cos", "sin", "positions", "positions_k", "cu_seqlens", "cu_seqlens_k", "blocks"};
  static constexpr const char* kOptions[] = {"softmax_scale", "causal",        "window",  "mask",        "block_size", "max_seqlen",
                                             "max_seqlen_k",  "deterministic", "backend", "interleaved", "gate_function", "softcap"};

  // `given`: those of kDifferentiable that are there. Returns out and lse. The rotated q and k, which have no gradient of
  // their own, stay on the stack.
  static variable_list forward(AutogradContext* ctx, const Inner& inner, at::TensorList) {
    variable_list saved;
    int64_t given = 0;
    for (size_t n = 0; n < std::size(kDifferentiable); ++n) {
      saved.push_back(inner.tensor(kDifferentiable[n]));
      given |= int64_t{saved[n].defined()} << n;
    }
    for (const char* name : kRead) saved.push_back(inner.tensor(name));
    for (const char* name : kOptions)
      if (inner.op.schema().argumentIndexWithName(name)) ctx->saved_data[name] = inner[name];
    ctx->saved_data["given"] = given;
    ctx->set_materialize_grads(false);
    const variable_list outputs = inner.run();
    if (outputs.size() > 2) saved[0] = outputs[2], saved[1] = outputs[3];
    saved.push_back(outputs[0]);
    saved.push_back(outputs[1]);
    ctx->save_for_backward(std::move(saved));
    return {outputs[0], outputs[1]};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const int64_t given = ctx->saved_data["given"].toInt();
    variable_list found(1);  // of `inner`
    c10::List<bool> needs;
    for (size_t n = 0; n < std::size(kDifferentiable); ++n) {
      const bool there = given >> n & 1;
      needs.push_back(there && ctx->needs_input_grad(found.size() - 1));
      if (there) found.emplace_back();
    }
    if (!grads[0].defined() && !grads[1].defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &out = saved[std::size(kDifferentiable) + std::size(kRead)], &lse = saved.back();
    Named named = {{"grad_out", grads[0].defined() ? grads[0] : at::zeros_like(out)}, {"grad_lse", optional(grads[1])},
                   {"out", out}, {"lse", lse}, {"needs", needs}};
    for (size_t n = 0; n < std::size(kDifferentiable); ++n) named.emplace_back(kDifferentiable[n], optional(saved[n]));
    for (size_t n = 0; n < std::size(kRead); ++n) named.emplace_back(kRead[n], optional(saved[std::size(kDifferentiable) + n]));
    const variable_list gradients = call("seal::attention_backward", named, ctx);
    for (size_t n = 0, at = 1; n < std::size(kDifferentiable); ++n) {
      if (needs.get(n)) found[at] = gradients[n];
      at += given >> n & 1;
    }
    return found;
  }
};

// The rotation is orthogonal: its gradient is the rotation back.
struct Rope : Function<Rope> {
  static constexpr const char* kRead[] = {"cos", "sin", "positions", "positions_k"};
  static constexpr const char* kRotated[] = {"q", "k"};
  static constexpr const char* kTokens[] = {"tokens of q", "tokens of k"};

  static variable_list forward(AutogradContext* ctx, const Inner& inner, at::TensorList) {
    variable_list saved;
    for (const char* name : kRead) saved.push_back(inner.tensor(name));
    ctx->save_for_backward(std::move(saved));
    for (const char* name : {"interleaved", "backend"}) ctx->saved_data[name] = inner[name];
    ctx->saved_data["inverse"] = !inner["inverse"].toBool();
    ctx->set_materialize_grads(false);
    variable_list outputs = inner.run();
    for (size_t n = 0; n < 2; ++n) ctx->saved_data[kTokens[n]] = outputs[n].sym_size(-3);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool needs[] = {grads[0].defined() && ctx->needs_input_grad(0), grads[1].defined() && ctx->needs_input_grad(1)};
    variable_list found(3);  // of `inner`, q, k
    if (!needs[0] && !needs[1]) return found;
    Named named;
    for (size_t n = 0; n < 2; ++n) {
      if (needs[n]) {
        named.emplace_back(kRotated[n], grads[n]);
        continue;
      }
      const Tensor& other = grads[1 - n];  // a tensor without a head takes the place of what nobody asked for
      c10::SymDimVector shape(other.sym_sizes().begin(), other.sym_sizes().end());
      shape[shape.size() - 3] = ctx->saved_data[kTokens[n]].toSymInt();
      shape[shape.size() - 2] = 0;
      named.emplace_back(kRotated[n], other.new_empty_symint(shape));
    }
    const variable_list saved = ctx->get_saved_variables();
    for (size_t n = 0; n < std::size(kRead); ++n) named.emplace_back(kRead[n], optional(saved[n]));
    const variable_list turned = call("seal::rope", named, ctx);
    for (size_t n = 0; n < 2; ++n)
      if (needs[n]) found[n + 1] = turned[n];
    return found;
  }
};

struct NoDerivative : Function<NoDerivative> {
  static variable_list forward(AutogradContext* ctx, const Inner& inner, at::TensorList) {
    ctx->saved_data["op"] = inner.op.schema().operator_name().name;
    return inner.run();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    const std::string& op = ctx->saved_data["op"].toStringRef();
    const char* which = op == "seal::attention_backward" ? " (second derivatives of attention)" : "";
    throw c10::NotImplementedError(SEAL_HERE, join(op, ": derivatives of its outputs", which, " are not implemented; detach them"));
  }
};

std::string layout_of(const Tensor& t) {
  if (t.is_nested()) return "a nested tensor";
  switch (t.layout()) {
    case at::kSparse: return "torch.sparse_coo";
    case at::kSparseCsr: return "torch.sparse_csr";
    case at::kSparseCsc: return "torch.sparse_csc";
    case at::kSparseBsr: return "torch.sparse_bsr";
    case at::kSparseBsc: return "torch.sparse_bsc";
    case at::kMkldnn: return "torch._mkldnn";
    default: return "another layout";
  }
}

}  // namespace

Differentiator::Differentiator(const c10::FunctionSchema& schema) : name_(schema.operator_name().name) {
  name_.erase(0, name_.find("::") + 2);
  kind_ = name_ == "attention" || name_ == "rope_attention" ? Kind::attention : name_ == "rope" ? Kind::rope : Kind::none;
}

void Differentiator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  const bool recording = at::GradMode::is_enabled();
  variable_list inputs;
  bool wanted = false;
  for (size_t n = 0; n < arguments.size(); ++n) {
    const IValue& value = (*stack)[first + n];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor& t = value.toTensor();
    const std::string& name = arguments[n].name();
    SEAL_CHECK(t.layout() == at::kStrided && !t.is_nested(), name_, name, "be a dense tensor", layout_of(t));
    if (t._fw_grad(0).defined())
      throw c10::NotImplementedError(SEAL_HERE, join("seal::", name_, ": forward-mode differentiation is not implemented, and ", name,
                                                     " has a tangent; use reverse mode (backward, torch.autograd.grad)"));
    if (!recording || !t.requires_grad()) continue;
    SEAL_CHECK(name != "cos" && name != "sin", name_, name, "be without a gradient (none flows into the angles; detach it)",
               "requires_grad=True");
    wanted = true;
  }
  const Inner inner{op, keys, stack};
  if (!wanted) {
    inner.run();
    return;
  }
  variable_list outputs;
  if (kind_ == Kind::attention) {
    for (const char* name : Attention::kDifferentiable)
      if (Tensor t = inner.tensor(name); t.defined()) inputs.push_back(std::move(t));
    outputs = Attention::apply(inner, at::TensorList(inputs));
  } else if (kind_ == Kind::rope) {
    inputs = {inner.tensor("q"), inner.tensor("k")};
    outputs = Rope::apply(inner, at::TensorList(inputs));
  } else {
    for (size_t n = 0; n < arguments.size(); ++n)
      if (const IValue& value = (*stack)[first + n]; value.isTensor() && value.toTensor().defined()) inputs.push_back(value.toTensor());
    outputs = NoDerivative::apply(inner, at::TensorList(inputs));
  }
  const size_t results = stack->size() - op.schema().returns().size();
  for (size_t n = 0; n < outputs.size(); ++n) (*stack)[results + n] = std::move(outputs[n]);
}

}  // namespace seal
