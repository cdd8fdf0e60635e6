// seal::attention_backward on the sm_90a kernels: guard, allocate, launch.
#include "../cuda/attention_backward.h"
#include "../cuda/launch_overrides.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>

#include "ops.h"
#include "tensors.h"

namespace seal {
namespace {

BackwardTensor describe(const Tensor& t) {
  return {t.const_data_ptr(), t.dim() == 3 ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

// Positions of one tensor's tokens; absent: first, first + 1, ...
BackwardPositions describe_positions(const Tensor* t, int64_t first) {
  if (!t) return {nullptr, 0, 0, first, false};
  return {t->const_data_ptr(), positions_batch_stride(*t), t->stride(-1), 0, t->scalar_type() == at::kLong};
}

}  // namespace

Outputs attention_backward(const Call& call) {
  const Tensor& q_in = *call.q;
  const Tensor *scale = call.scale, *offset = call.offset;
  const int64_t heads = call.heads_q, head_dim = call.head_dim;

  const c10::cuda::CUDAGuard guard(q_in.device());
  const auto floats = q_in.options().dtype(at::kFloat);
  const auto room = [](bool wanted, const Tensor* like, const at::TensorOptions& options) {
    return wanted ? at::empty(like->sizes(), options) : at::empty({0}, options);
  };
  Tensor grad_q = room(call.needs[0], call.q, q_in.options()), grad_k = room(call.needs[1], call.k, q_in.options());
  Tensor grad_v = room(call.needs[2], call.v, q_in.options());
  Tensor grad_scale = room(call.needs_scale, scale, floats), grad_offset = room(call.needs_offset, offset, floats);
  // The kernels have no sink and no gate (dispatch.cpp), so those have no gradient.
  const Tensor grad_sink = at::empty({0}, floats), grad_gate = at::empty({0}, q_in.options());
  if (call.rows == 0 || heads == 0)
    return {grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_scale.zero_(), grad_offset.zero_(), grad_sink, grad_gate};

  const Tensor q = aligned(q_in), k = aligned(*call.k), v = aligned(*call.v), out = aligned(*call.out), grad_out = aligned(*call.grad_out);
  const Tensor lse = call.lse->contiguous(), grad_lse = contiguous(call.grad_lse);
  const Tensor cu_q = contiguous(call.cu_seqlens), cu_k = call.cu_seqlens_k ? contiguous(call.cu_seqlens_k) : cu_q;
  const Tensor offsets = offset ? unit_last_stride(*offset) : Tensor();

  AttentionBackwardParams p{};
  p.batch = static_cast<int32_t>(call.rows);
  p.seqlen_q = static_cast<int32_t>(call.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(call.seqlen_k);
  p.heads_q = static_cast<int32_t>(heads);
  p.heads_k = static_cast<int32_t>(call.heads_k);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.cu_seqlens_q = data_or_null<int32_t>(cu_q);
  p.cu_seqlens_k = data_or_null<int32_t>(cu_k);
  p.half = q.scalar_type() == at::kHalf;
  p.deterministic = call.deterministic;
  p.multiprocessors = launch_overrides().multiprocessors;
  p.enough_ctas = launch_overrides().enough_ctas;
  p.mask = call.visible;
  p.softmax_scale = static_cast<float>(call.sigma);
  p.q = describe(q);
  p.k = describe(k);
  p.v = describe(v);
  p.out = describe(out);
  p.grad_out = describe(grad_out);
  p.lse = lse.const_data_ptr<float>();
  p.grad_lse = data_or_null<float>(grad_lse);
  if (scale) {
    const FactorStrides strides = factor_strides(*scale, heads, head_dim);
    p.scale = scale->const_data_ptr<float>();
    p.scale_batch_stride = strides.batch;
    p.scale_head_stride = strides.head;
    p.scale_channel_stride = strides.channel;
    const bool channel_rows = scale->dim() == 2 && scale->size(0) == heads && scale->size(1) == head_dim;
    p.grad_scale_per_batch = (scale->dim() == 3 || (scale->dim() == 2 && !channel_rows)) && scale->size(0) > 1;
    p.grad_scale_per_channel = channel_rows || (scale->dim() == 3 && scale->size(2) == head_dim);
  }
  if (offset) {
    const FactorStrides strides = factor_strides(offsets, heads, head_dim);
    p.offset = offsets.const_data_ptr<float>();
    p.offset_batch_stride = strides.batch;
    p.offset_head_stride = strides.head;
    p.grad_offset_per_batch = offset->dim() == 3 && offset->size(0) > 1;
  }
  std::optional<RotationTables> tables;
  if (call.cos && (call.needs[0] || call.needs[1])) {
    const RotationTables& table = tables.emplace(*call.cos, *call.sin);
    p.cos = table.cos.const_data_ptr();
    p.sin = table.sin.const_data_ptr();
    p.cos_type = table.cos.scalar_type() == at::kBFloat16 ? 0 : table.cos.scalar_type() == at::kHalf ? 1 : 2;
    p.rotary_dim = static_cast<int32_t>(2 * table.cos.size(-1));
    p.cos_batch_stride = table.batch_stride(table.cos);
    p.cos_row_stride = table.cos.stride(-2);
    p.sin_batch_stride = table.batch_stride(table.sin);
    p.sin_row_stride = table.sin.stride(-2);
    p.cos_rows = table.cos.size(-2);
    p.interleaved = call.interleaved;
    p.positions_q = describe_positions(call.positions, call.packed ? 0 : std::max<int64_t>(0, call.seqlen_k - call.seqlen_q));
    p.positions_k = describe_positions(call.positions_k ? call.positions_k : call.positions, 0);
  }
  const auto data = [](const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  p.grad_q = data(grad_q);
  p.grad_k = data(grad_k);
  p.grad_v = data(grad_v);
  p.grad_scale = static_cast<float*>(data(grad_scale));
  p.grad_offset = static_cast<float*>(data(grad_offset));
  const Tensor workspace = at::empty({static_cast<int64_t>(attention_backward_workspace(p))}, q.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(launch_attention_backward(p, c10::cuda::getCurrentCUDAStream()));
  return {grad_q, grad_k, grad_v, grad_scale, grad_offset, grad_sink, grad_gate};
}

}  // namespace seal
