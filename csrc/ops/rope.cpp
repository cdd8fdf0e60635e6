// seal::rope and seal::rope_attention on CUDA tensors: check, guard, allocate, launch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../cuda/rope.h"
#include "checks.h"
#include "ops.h"

namespace seal {
namespace {

// Shapes spoken once: sizes of q, k and the rotation, read from the tensors by check().
struct RopeSizes {
  int64_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, rotary_dim;
  bool packed;   // q [Tq, Hq, D], k [Tk, Hkv, D]; else q [B, Sq, Hq, D], k [B, Sk, Hkv, D]
  bool per_token;  // cos, sin [B or 1, S, R/2]; else a table [N, R/2]
};

void check_positions(const char* op, const char* name, const OptTensor& positions, const Tensor& q, const RopeSizes& n,
                     int64_t seqlen) {
  if (!positions) return;
  const auto type = positions->scalar_type();
  SEAL_CHECK(type == at::kInt || type == at::kLong, op, name, "be int32 or int64", type);
  SEAL_CHECK(positions->device() == q.device(), op, name, "be on q's device", positions->device());
  const bool row = positions->dim() == 1 && positions->size(0) == seqlen;
  const bool rows = !n.packed && positions->dim() == 2 && positions->size(1) == seqlen &&
                    (positions->size(0) == n.batch || positions->size(0) == 1);
  SEAL_CHECK(row || rows, op, name, c10::str("have shape [", seqlen, "]", n.packed ? "" : c10::str(" or [", n.batch, ", ", seqlen, "]")),
             positions->sizes());
}

RopeSizes check(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                const OptTensor& positions, const OptTensor& positions_k) {
  const auto type = q.scalar_type();
  SEAL_CHECK(q.dim() == 3 || q.dim() == 4, op, "q", "have the layout [B, S, H, D] or packed [T, H, D]", q.sizes());
  SEAL_CHECK(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat, op, "q", "be bfloat16, float16 or float32 on the cuda backend", type);
  SEAL_CHECK(k.dim() == q.dim(), op, "k", "have q's layout", k.sizes());
  SEAL_CHECK(k.scalar_type() == type, op, "k", "have q's dtype", k.scalar_type());
  SEAL_CHECK(k.size(-1) == q.size(-1), op, "k", "have q's head_dim", k.size(-1));
  SEAL_CHECK(q.dim() == 3 || k.size(0) == q.size(0), op, "k", "have q's batch size", k.size(0));
  const std::pair<const char*, const Tensor&> others[] = {{"k", k}, {"cos", cos}, {"sin", sin}};
  for (const auto& [name, t] : others) SEAL_CHECK(t.device() == q.device(), op, name, "be on q's device", t.device());

  RopeSizes n;
  n.packed = q.dim() == 3;
  n.per_token = cos.dim() == 3;
  n.batch = n.packed ? 1 : q.size(0);
  n.seqlen_q = q.size(-3), n.heads_q = q.size(-2), n.head_dim = q.size(-1);
  n.seqlen_k = k.size(-3), n.heads_k = k.size(-2);
  n.rotary_dim = cos.dim() > 0 ? 2 * cos.size(-1) : 0;
  const int64_t longest = std::max(n.seqlen_q, n.seqlen_k);
  SEAL_CHECK(longest * n.batch <= std::numeric_limits<int32_t>::max(), op, "q", "have at most 2^31 - 1 tokens, as k", q.sizes());

  for (const auto& [name, t] : {others[1], others[2]})
    SEAL_CHECK(at::isFloatingType(t.scalar_type()), op, name, "be of a floating dtype", t.scalar_type());
  SEAL_CHECK(cos.dim() == 2 || (n.per_token && !n.packed), op, "cos", "have shape [N, R/2] (a table) or, for dense q, [B, S, R/2]", cos.sizes());
  SEAL_CHECK(sin.sizes() == cos.sizes(), op, "sin", "have cos' shape", sin.sizes());
  SEAL_CHECK(n.rotary_dim >= 2 && n.rotary_dim <= n.head_dim, op, "cos",
             c10::str("turn at most head_dim ", n.head_dim, " channels (last size R/2 from 1 to ", n.head_dim / 2, ")"), cos.size(-1));
  if (n.per_token) {
    SEAL_CHECK(!positions && !positions_k, op, "positions", "be None with cos and sin already gathered per token [B, S, R/2]", "positions");
    SEAL_CHECK(n.seqlen_q == n.seqlen_k && cos.size(1) == n.seqlen_q && (cos.size(0) == 1 || cos.size(0) == n.batch), op, "cos",
               c10::str("have shape [", n.batch, " or 1, ", n.seqlen_q, ", R/2] with Sq = Sk"), cos.sizes(), " with Sk ", n.seqlen_k);
  } else if (!positions) {
    SEAL_CHECK(!positions_k, op, "positions", "be given where positions_k is", "None");
    SEAL_CHECK(!n.packed, op, "positions", "be given for packed q and k (int32 or int64 [T])", "None");
    SEAL_CHECK(cos.size(0) >= longest, op, "cos", c10::str("have a row for each of ", longest, " positions"), cos.sizes());
  } else {
    SEAL_CHECK(positions_k || n.seqlen_q == n.seqlen_k, op, "positions_k",
               c10::str("be given where Sq (", n.seqlen_q, ") and Sk (", n.seqlen_k, ") differ"), "None");
  }
  check_positions(op, "positions", positions, q, n, n.seqlen_q);
  check_positions(op, "positions_k", positions_k, q, n, n.seqlen_k);
  return n;
}

RopeType rope_type(at::ScalarType type) {
  return type == at::kBFloat16 ? RopeType::bf16 : type == at::kHalf ? RopeType::fp16 : RopeType::fp32;
}

Tensor unit_last_stride(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

RopeOperand operand(const Tensor& in, const Tensor& out, const OptTensor& positions, int64_t first_position) {
  const bool packed = in.dim() == 3, rows = positions && positions->dim() == 2 && positions->size(0) > 1;
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
  // The kernel reads both tables in one of three dtypes; any other pair is converted.
  const auto found = cos_in.scalar_type();
  const bool readable = found == sin_in.scalar_type() && (found == at::kBFloat16 || found == at::kHalf);
  const auto type = readable ? found : at::kFloat;
  const Tensor cos = unit_last_stride(cos_in.to(type)), sin = unit_last_stride(sin_in.to(type));
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());

  OptTensor at_k = positions_k ? positions_k : positions;
  OptTensor at_q = positions;
  if (at_k && at_k->scalar_type() != at_q->scalar_type()) {
    at_q = at_q->to(at::kLong);
    at_k = at_k->to(at::kLong);
  }
  RopeParams p{};
  p.q = operand(q, q_out, at_q, std::max<int64_t>(0, n.seqlen_k - n.seqlen_q));
  p.k = operand(k, k_out, at_k, 0);
  p.joint = n.seqlen_q == n.seqlen_k && !positions_k;
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
  p.positions_int64 = at_q && at_q->scalar_type() == at::kLong;
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
