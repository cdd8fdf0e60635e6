#include "call.h"

#include <optional>
#include <type_traits>
#include <utility>

#include "text.h"

namespace seal {
namespace {

using Field = void (*)(Call&, const c10::IValue&);

template <auto member>
void tensor(Call& call, const c10::IValue& value) {
  if (value.isTensor() && value.toTensor().defined()) call.*member = &value.toTensor();
}

template <auto member>
void number(Call& call, const c10::IValue& value) {
  if (value.isNone()) return;
  if constexpr (std::is_same_v<std::remove_cvref_t<decltype(call.*member)>, std::optional<double>>) call.*member = value.toDouble();
  else call.*member = value.toInt();
}

template <auto member>
void flag(Call& call, const c10::IValue& value) {
  call.*member = value.toBool();
}

void needs(Call& call, const c10::IValue& value) {
  for (const bool wanted : value.toBoolList()) call.needs.push_back(wanted);
}

void mask(Call& call, const c10::IValue& value) {
  call.has_mask = !value.isNone();
  if (!call.has_mask) return;
  for (const int64_t number : value.toIntVector()) call.mask.push_back(number);
}

template <auto member>
void text(Call& call, const c10::IValue& value) {
  call.*member = value.toStringRef();
}

const std::pair<const char*, Field> kFields[] = {
    {"q", tensor<&Call::q>}, {"k", tensor<&Call::k>}, {"v", tensor<&Call::v>}, {"out", tensor<&Call::out>}, {"lse", tensor<&Call::lse>},
    {"grad_out", tensor<&Call::grad_out>}, {"grad_lse", tensor<&Call::grad_lse>}, {"scale", tensor<&Call::scale>},
    {"offset", tensor<&Call::offset>}, {"cos", tensor<&Call::cos>}, {"sin", tensor<&Call::sin>}, {"positions", tensor<&Call::positions>},
    {"positions_k", tensor<&Call::positions_k>}, {"cu_seqlens", tensor<&Call::cu_seqlens>}, {"cu_seqlens_k", tensor<&Call::cu_seqlens_k>},
    {"softmax_scale", number<&Call::softmax_scale>}, {"window", number<&Call::window>}, {"mask", mask}, {"blocks", tensor<&Call::blocks>}, {"block_size", number<&Call::block_size>}, {"max_seqlen", number<&Call::max_seqlen>},
    {"max_seqlen_k", number<&Call::max_seqlen_k>}, {"causal", flag<&Call::causal>}, {"deterministic", flag<&Call::deterministic>},
    {"interleaved", flag<&Call::interleaved>}, {"inverse", flag<&Call::inverse>}, {"needs", needs}, {"backend", text<&Call::backend>},
    {"sink", tensor<&Call::sink>}, {"gate", tensor<&Call::gate>}, {"gate_function", text<&Call::gate_function>},
    {"softcap", number<&Call::softcap>}};

}  // namespace

CallReader::CallReader(const c10::FunctionSchema& schema) : op_(schema.operator_name().name) {
  op_.erase(0, op_.find("::") + 2);
  for (const auto& argument : schema.arguments()) {
    if (argument.type()->kind() == c10::TypeKind::TensorType) required_.emplace_back(fields_.size(), argument.name());
    Field found = nullptr;
    for (const auto& [name, field] : kFields)
      if (argument.name() == name) found = field;
    // An argument that only a portable body knows is no business of the kernels.
    fields_.push_back(found ? found : [](Call&, const c10::IValue&) {});
  }
}

Call CallReader::read(const torch::jit::Stack& stack) const {
  Call call;
  call.op = op_;
  const size_t first = stack.size() - fields_.size();
  // The dispatcher takes None for a tensor, as an undefined one.
  for (const auto& [n, name] : required_) {
    const c10::IValue& value = stack[first + n];
    SEAL_CHECK(value.isTensor() && value.toTensor().defined(), op_, name, "be a tensor", "None");
  }
  for (size_t n = 0; n < fields_.size(); ++n) fields_[n](call, stack[first + n]);
  return call;
}

}  // namespace seal
