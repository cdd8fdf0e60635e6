// seal::rope and seal::rope_attention on CUDA tensors: guard, allocate, launch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../cuda/rope.h"
#include "ops.h"
#include "tensors.h"

namespace seal {
namespace {

RopeType rope_type(at::ScalarType type) {
  return type == at::kBFloat16 ? RopeType::bf16 : type == at::kHalf ? RopeType::fp16 : RopeType::fp32;
}

RopeOperand operand(const Tensor& in, const Tensor& out, const Tensor* positions, int64_t first_position) {
  const bool packed = in.dim() == 3;
  RopeOperand x{};
  x.in = in.const_data_ptr();
  x.out = out.mutable_data_ptr();
  x.batch_stride = packed ? 0 : in.stride(0);
  x.token_stride = in.stride(-3);
  x.head_stride = in.stride(-2);
  x.seqlen = static_cast<int32_t>(in.size(-3));
  x.heads = static_cast<int32_t>(in.size(-2));
  if (positions) {
    x.positions = positions->const_data_ptr();
    x.positions_batch_stride = positions_batch_stride(*positions);
    x.positions_token_stride = positions->stride(-1);
  }
  x.first_position = first_position;
  return x;
}

Outputs rotate(const Call& call, bool inverse) {
  const c10::cuda::CUDAGuard guard(call.q->device());
  const Tensor q = unit_last_stride(*call.q), k = unit_last_stride(*call.k);
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  const RotationTables table(*call.cos, *call.sin);
  // The kernel reads both positions in one dtype.
  Tensor at_q = call.positions ? *call.positions : Tensor();
  Tensor at_k = call.positions_k ? *call.positions_k : at_q;
  if (at_q.defined() && at_k.scalar_type() != at_q.scalar_type()) {
    at_q = at_q.to(at::kLong);
    at_k = at_k.to(at::kLong);
  }
  const auto given = [](const Tensor& t) { return t.defined() ? &t : nullptr; };
  RopeParams p{};
  p.q = operand(q, q_out, given(at_q), std::max<int64_t>(0, call.seqlen_k - call.seqlen_q));
  p.k = operand(k, k_out, given(at_k), 0);
  p.joint = call.seqlen_q == call.seqlen_k && !call.positions_k;
  p.batch = static_cast<int32_t>(call.packed ? 1 : call.rows);
  p.head_dim = static_cast<int32_t>(call.head_dim);
  p.rotary_dim = static_cast<int32_t>(2 * table.cos.size(-1));
  p.cos = table.cos.const_data_ptr();
  p.sin = table.sin.const_data_ptr();
  p.cos_batch_stride = table.batch_stride(table.cos);
  p.sin_batch_stride = table.batch_stride(table.sin);
  p.cos_row_stride = table.cos.stride(-2);
  p.sin_row_stride = table.sin.stride(-2);
  p.cos_rows = table.cos.size(-2);
  p.type = rope_type(q.scalar_type());
  p.cos_type = rope_type(table.cos.scalar_type());
  p.positions_int64 = at_q.defined() && at_q.scalar_type() == at::kLong;
  p.interleaved = call.interleaved;
  p.inverse = inverse;
  C10_CUDA_CHECK(launch_rope(p, c10::cuda::getCurrentCUDAStream()));
  return {q_out, k_out};
}

}  // namespace

Outputs rope(const Call& call) { return rotate(call, call.inverse); }

Outputs rope_attention(const Call& call) {
  const Outputs rotated = rotate(call, false);
  Call inner = call;
  inner.q = &rotated[0];
  inner.k = &rotated[1];
  Outputs found = attention(inner);
  found.insert(found.end(), rotated.begin(), rotated.end());
  return found;
}

}  // namespace seal
