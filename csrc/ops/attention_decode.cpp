#include "attention_decode.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/attention_decode.h"

namespace seal {

bool attention_by_splits(const AttentionForwardParams& params, int64_t max_length_q) {
  if (!prefers_attention_decode(params, max_length_q)) return false;
  AttentionDecodePlan plan;
  C10_CUDA_CHECK(plan_attention_decode(params, max_length_q, 0, &plan));
  at::Tensor workspace;
  if (plan.workspace_bytes > 0) workspace = at::empty({plan.workspace_bytes / 4}, at::TensorOptions().dtype(at::kFloat).device(at::kCUDA));
  C10_CUDA_CHECK(launch_attention_decode(params, plan, workspace.defined() ? workspace.mutable_data_ptr() : nullptr,
                                         c10::cuda::getCurrentCUDAStream()));
  return true;
}

}  // namespace seal
