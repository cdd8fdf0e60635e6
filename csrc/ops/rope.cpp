// seal::rope and seal::rope_attention on CUDA tensors: check, guard, allocate, launch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "../cuda/rope.h"
#include "ops.h"

namespace seal {
namespace {

// Shapes spoken once: sizes of q, k and the rotation, read from the tensors by check().
struct RopeSizes {
  int64_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, rotary_dim;
  bool packed;   // q [Tq, Hq, D], k [Tk, Hkv, D]; else q [B, Sq, Hq, D], k [B, Sk, Hkv, D]
  bool per_token;  // cos, sin [B or 1, S, R/2]; else a table [N, R/2]
};

bool is_float(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble;
}

void check_positions(const char* op, const char* name, const OptTensor& positions, const Tensor& q, const RopeSizes& n,
                     int64_t seqlen) {
  if (!positions.has_value()) return;
  const auto type = positions->scalar_type();
  TORCH_CHECK_VALUE(type == at::kInt || type == at::kLong, "seal::", op, ": ", name, " must be int32 or int64, got ", type);
  TORCH_CHECK_VALUE(positions->device() == q.device(), "seal::", op, ": ", name, " must be on q's device ", q.device(), ", got ",
                    positions->device());
  const bool row = positions->dim() == 1 && positions->size(0) == seqlen;
  const bool rows = !n.packed && positions->dim() == 2 && positions->size(1) == seqlen &&
                    (positions->size(0) == n.batch || positions->size(0) == 1);
  TORCH_CHECK_VALUE(row || rows, "seal::", op, ": ", name, " must have shape [", seqlen, "]",
                    n.packed ? "" : " or [" + std::to_string(n.batch) + ", " + std::to_string(seqlen) + "]", ", got ",
                    positions->sizes());
}

RopeSizes check(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                const OptTensor& positions, const OptTensor& positions_k) {
  RopeSizes n;
  n.packed = q.dim() == 3;
  TORCH_CHECK_VALUE(q.dim() == 3 || q.dim() == 4, "seal::", op, ": q must have the layout [B, S, H, D] or packed [T, H, D], got ", q.sizes());
  TORCH_CHECK_VALUE(k.dim() == q.dim(), "seal::", op, ": k must have as many dimensions as q (", q.dim(), "), got ", k.sizes());
  for (const Tensor* t : {&k, &cos, &sin})
    TORCH_CHECK_VALUE(t->device() == q.device(), "seal::", op, ": k, cos and sin must be on q's device ", q.device(), ", got ", t->device());
  const auto type = q.scalar_type();
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat, "seal::", op,
                    ": q must be bfloat16, float16 or float32 on a GPU, got ", type);
  TORCH_CHECK_VALUE(k.scalar_type() == type, "seal::", op, ": k must have q's dtype ", type, ", got ", k.scalar_type());
  n.batch = n.packed ? 1 : q.size(0);
  n.seqlen_q = q.size(-3), n.heads_q = q.size(-2), n.head_dim = q.size(-1);
  n.seqlen_k = k.size(-3), n.heads_k = k.size(-2);
  TORCH_CHECK_VALUE(k.size(-1) == n.head_dim, "seal::", op, ": k must have q's head_dim ", n.head_dim, ", got ", k.size(-1));
  TORCH_CHECK_VALUE(n.packed || k.size(0) == n.batch, "seal::", op, ": k must have q's batch size ", n.batch, ", got ", k.size(0));

  n.per_token = cos.dim() == 3;
  TORCH_CHECK_VALUE(is_float(cos.scalar_type()) && is_float(sin.scalar_type()), "seal::", op, ": cos and sin must be of a floating dtype, got ",
                    cos.scalar_type(), " and ", sin.scalar_type());
  TORCH_CHECK_VALUE(cos.dim() == 2 || (n.per_token && !n.packed), "seal::", op,
                    ": cos must have shape [N, R/2] (a table) or, for dense q, [B, S, R/2], got ", cos.sizes());
  TORCH_CHECK_VALUE(sin.sizes() == cos.sizes(), "seal::", op, ": sin must have cos' shape ", cos.sizes(), ", got ", sin.sizes());
  n.rotary_dim = 2 * cos.size(-1);
  TORCH_CHECK_VALUE(n.rotary_dim >= 2 && n.rotary_dim <= n.head_dim, "seal::", op, ": cos must turn at most head_dim ", n.head_dim,
                    " channels (last size R/2 from 1 to ", n.head_dim / 2, "), got ", cos.size(-1));
  const int64_t rows = cos.size(-2);
  if (n.per_token) {
    TORCH_CHECK_VALUE(!positions.has_value() && !positions_k.has_value(), "seal::", op,
                      ": positions must be None with cos and sin already gathered per token [B, S, R/2], got positions");
    TORCH_CHECK_VALUE(n.seqlen_q == n.seqlen_k && rows == n.seqlen_q && (cos.size(0) == 1 || cos.size(0) == n.batch), "seal::", op,
                      ": cos must have shape [", n.batch, " or 1, ", n.seqlen_q, ", R/2] with Sq = Sk, got ", cos.sizes(), " with Sk ", n.seqlen_k);
  } else if (!positions.has_value()) {
    TORCH_CHECK_VALUE(!positions_k.has_value(), "seal::", op, ": positions must be given where positions_k is, got None");
    TORCH_CHECK_VALUE(!n.packed, "seal::", op, ": positions must be given for packed q and k (int32 or int64 [T]), got None");
    TORCH_CHECK_VALUE(rows >= std::max(n.seqlen_q, n.seqlen_k), "seal::", op, ": cos must have a row for each of ",
                      std::max(n.seqlen_q, n.seqlen_k), " positions, got ", cos.sizes());
  } else {
    TORCH_CHECK_VALUE(positions_k.has_value() || n.seqlen_q == n.seqlen_k, "seal::", op, ": positions_k must be given where Sq (",
                      n.seqlen_q, ") and Sk (", n.seqlen_k, ") differ, got None");
  }
  check_positions(op, "positions", positions, q, n, n.seqlen_q);
  check_positions(op, "positions_k", positions_k, q, n, n.seqlen_k);
  TORCH_CHECK_VALUE(std::max(n.seqlen_q, n.seqlen_k) * n.batch <= std::numeric_limits<int32_t>::max(), "seal::", op,
                    ": q and k must have at most 2^31 - 1 tokens, got ", q.sizes(), " and ", k.sizes());
  return n;
}

RopeType rope_type(at::ScalarType type) {
  return type == at::kBFloat16 ? RopeType::bf16 : type == at::kHalf ? RopeType::fp16 : RopeType::fp32;
}

Tensor unit_last_stride(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

RopeOperand operand(const Tensor& in, const Tensor& out, const OptTensor& positions, int64_t first_position) {
  const bool packed = in.dim() == 3, rows = positions.has_value() && positions->dim() == 2 && positions->size(0) > 1;
  RopeOperand x{};
  x.in = in.const_data_ptr();
  x.out = out.mutable_data_ptr();
  x.batch_stride = packed ? 0 : in.stride(0);
  x.token_stride = in.stride(-3);
  x.head_stride = in.stride(-2);
  x.seqlen = static_cast<int32_t>(in.size(-3));
  x.heads = static_cast<int32_t>(in.size(-2));
  if (positions.has_value()) {
    x.positions = positions->const_data_ptr();
    x.positions_batch_stride = rows ? positions->stride(0) : 0;
    x.positions_token_stride = positions->stride(-1);
  }
  x.first_position = first_position;
  return x;
}

std::tuple<Tensor, Tensor> rotate(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& cos_in, const Tensor& sin_in,
                                  const OptTensor& positions, const OptTensor& positions_k, bool interleaved, bool inverse) {
  const RopeSizes n = check(op, q_in, k_in, cos_in, sin_in, positions, positions_k);
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in);
  // fp64 tables become fp32, and one dtype serves both.
  const auto type = cos_in.scalar_type() == sin_in.scalar_type() && cos_in.scalar_type() != at::kDouble ? cos_in.scalar_type() : at::kFloat;
  const Tensor cos = unit_last_stride(cos_in.to(type)), sin = unit_last_stride(sin_in.to(type));
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());

  OptTensor at_k = positions_k.has_value() ? positions_k : positions;
  OptTensor at_q = positions;
  if (at_k.has_value() && at_k->scalar_type() != at_q->scalar_type()) {
    at_q = at_q->to(at::kLong);
    at_k = at_k->to(at::kLong);
  }
  RopeParams p{};
  p.q = operand(q, q_out, at_q, std::max<int64_t>(0, n.seqlen_k - n.seqlen_q));
  p.k = operand(k, k_out, at_k, 0);
  p.joint = n.seqlen_q == n.seqlen_k && !positions_k.has_value();
  p.batch = static_cast<int32_t>(n.batch);
  p.head_dim = static_cast<int32_t>(n.head_dim);
  p.rotary_dim = static_cast<int32_t>(n.rotary_dim);
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.cos_batch_stride = n.per_token && cos.size(0) > 1 ? cos.stride(0) : 0;
  p.sin_batch_stride = n.per_token && sin.size(0) > 1 ? sin.stride(0) : 0;
  p.cos_row_stride = cos.stride(-2);
  p.sin_row_stride = sin.stride(-2);
  p.cos_rows = cos.size(-2);
  p.type = rope_type(q.scalar_type());
  p.cos_type = rope_type(type);
  p.positions_int64 = at_q.has_value() && at_q->scalar_type() == at::kLong;
  p.interleaved = interleaved;
  p.inverse = inverse;
  C10_CUDA_CHECK(launch_rope(p, c10::cuda::getCurrentCUDAStream()));
  return {q_out, k_out};
}

}  // namespace

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                                const OptTensor& positions_k, bool interleaved, bool inverse) {
  return rotate("rope", q, k, cos, sin, positions, positions_k, interleaved, inverse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
    const OptTensor& positions_k, const OptTensor& scale, const OptTensor& offset, const OptTensor& cu_seqlens,
    const OptTensor& cu_seqlens_k, bool interleaved, std::optional<double> softmax_scale, bool causal,
    std::optional<int64_t> window, std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic) {
  auto [q_rotated, k_rotated] = rotate("rope_attention", q, k, cos, sin, positions, positions_k, interleaved, false);
  auto [out, lse] = attention(q_rotated, k_rotated, v, scale, offset, cu_seqlens, cu_seqlens_k, softmax_scale, causal, window,
                              max_seqlen, max_seqlen_k, deterministic);
  return {out, lse, q_rotated, k_rotated};
}

}  // namespace seal
