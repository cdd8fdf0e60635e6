// seal::attention on the sm_90a kernels: guard, allocate, launch.
#include "../cuda/attention.h"
#include "../cuda/launch_overrides.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "attention_decode.h"
#include "ops.h"
#include "tensors.h"

namespace seal {
namespace {

AttentionTensor describe(const Tensor& t) {
  const bool packed = t.dim() == 3;
  return {t.const_data_ptr(), packed ? 1 : t.size(0), t.size(-3), t.size(-2), packed ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

ChannelTensor describe(const Tensor* t, const Call& call) {
  if (!t) return {nullptr, 0, 0, 0};
  const FactorStrides strides = factor_strides(*t, call.heads_q, call.head_dim);
  return {t->const_data_ptr<float>(), strides.batch, strides.head, strides.channel};
}

}  // namespace

Outputs attention(const Call& call) {
  // The forward is deterministic, and needs no bound on the lengths but to know that queries are few.
  const Tensor& q_in = *call.q;
  const c10::cuda::CUDAGuard guard(q_in.device());
  Tensor out = at::empty(q_in.sizes(), q_in.options());
  const auto floats = q_in.options().dtype(at::kFloat);
  Tensor lse = call.packed ? at::empty({call.heads_q, call.seqlen_q}, floats) : at::empty({call.rows, call.heads_q, call.seqlen_q}, floats);
  if (out.numel() == 0) return {out, lse};
  if (call.rows == 0) return {out.zero_(), lse.fill_(-INFINITY)};  // packed tokens that belong to no sequence

  const Tensor q = aligned(q_in), k = aligned(*call.k), v = aligned(*call.v);
  const Tensor cu_q = contiguous(call.cu_seqlens), cu_k = call.cu_seqlens_k ? contiguous(call.cu_seqlens_k) : cu_q;
  const Tensor tile_counter = at::empty({1}, q.options().dtype(at::kInt));

  AttentionForwardParams params;
  params.q = describe(q);
  params.k = describe(k);
  params.v = describe(v);
  params.out = describe(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.scale = describe(call.scale, call);
  params.offset = describe(call.offset, call);
  params.cu_seqlens_q = data_or_null<int32_t>(cu_q);
  params.cu_seqlens_k = data_or_null<int32_t>(cu_k);
  params.sequences = static_cast<int32_t>(call.rows);
  params.head_dim = static_cast<int32_t>(call.head_dim);
  params.softmax_scale = static_cast<float>(call.sigma);
  params.mask = call.visible;
  params.half = q.scalar_type() == at::kHalf;
  params.tile_counter = tile_counter.mutable_data_ptr<int32_t>();
  params.multiprocessors = launch_overrides().multiprocessors;
  if (attention_by_splits(params, call.packed ? call.max_seqlen.value_or(call.seqlen_q) : call.seqlen_q)) return {out, lse};
  C10_CUDA_CHECK(launch_attention_forward(params, c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

}  // namespace seal
