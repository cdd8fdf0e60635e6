// One call of an op, by name: the arguments as the dispatcher hands them over, and what check() derives from them. A new
// argument is a field here, a line in call.cpp and its schema; bodies and checks then read it by name.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../cuda/mask.h"

namespace seal {

using at::Tensor;

struct Call {
  std::string_view op;  // as backend: text that outlives the call

  // The caller's tensors, null where the op has no such argument or it is None. They belong to the dispatcher's stack.
  const Tensor *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr, *lse = nullptr, *grad_out = nullptr, *grad_lse = nullptr;
  const Tensor *scale = nullptr, *offset = nullptr, *cos = nullptr, *sin = nullptr, *positions = nullptr, *positions_k = nullptr;
  const Tensor *cu_seqlens = nullptr, *cu_seqlens_k = nullptr, *blocks = nullptr, *sink = nullptr, *gate = nullptr;
  std::optional<double> softmax_scale, softcap;
  std::optional<int64_t> window, max_seqlen, max_seqlen_k;
  c10::SmallVector<int64_t, 8> mask;  // as given; empty: None
  bool has_mask = false;
  int64_t block_size = 128;  // tokens of a side of an element of `blocks`
  bool causal = true, deterministic = false, interleaved = false, inverse = false;
  c10::SmallVector<bool, 7> needs;  // of attention_backward: q, k, v, scale, offset, and sink and gate or not
  std::string_view backend = "auto", gate_function = "sigmoid";

  // Derived by check().
  bool packed = false;             // q [Tq, Hq, D], k and v [Tk, Hkv, D]; else [B, S, H, D]
  int64_t rows = 0;                // batch rows, or packed sequences
  int64_t seqlen_q = 0, seqlen_k = 0, heads_q = 0, heads_k = 0, head_dim = 0;  // packed: lengths are totals of tokens
  double sigma = 0;                // the softmax scale in force
  Mask visible;                    // what the mask or its shorthands say
  bool needs_scale = false, needs_offset = false;  // asked for, and there

  bool needs_input(size_t n) const { return n < needs.size() && needs[n]; }
};

// Where an op's arguments lie on the stack, looked up once an op.
class CallReader {
 public:
  explicit CallReader(const c10::FunctionSchema& schema);
  // Raises ValueError where a tensor that the op must have is None.
  Call read(const torch::jit::Stack& stack) const;
  size_t arguments() const { return fields_.size(); }

 private:
  using Field = void (*)(Call&, const c10::IValue&);
  std::string op_;
  std::vector<Field> fields_;  // one an argument, in the schema's order
  std::vector<std::pair<size_t, std::string>> required_;  // tensors that may not be None: place and name
};

}  // namespace seal
