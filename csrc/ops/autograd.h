// Differentiation of the ops: the boxed kernel of the dispatcher's Autograd key.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

namespace seal {

// Autograd kernel of one op. The backward of attention and rope_attention is attention_backward, that of rope is rope
// (docs/ops.md); the outputs of any other op (attention_backward among them) refuse a backward in one sentence.
class Differentiator : public c10::OperatorKernel {
 public:
  explicit Differentiator(const c10::FunctionSchema& schema);
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

 private:
  enum class Kind { attention, rope, none };

  std::string name_;
  Kind kind_;
};

}  // namespace seal
