// seal::attention for CUDA tensors: check, guard, allocate, launch.
#include "../cuda/attention.h"
#include "../cuda/launch_overrides.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "attention_decode.h"
#include "checks.h"
#include "ops.h"

namespace seal {
namespace {

AttentionTensor describe(const Tensor& t) {
  const bool packed = t.dim() == 3;
  return {t.const_data_ptr(), packed ? 1 : t.size(0), t.size(-3), t.size(-2), packed ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

ChannelTensor describe(const OptTensor& t, int64_t heads, int64_t head_dim) {
  if (!t) return {nullptr, 0, 0, 0};
  const FactorStrides strides = factor_strides(*t, heads, head_dim);
  return {t->const_data_ptr<float>(), strides.batch, strides.head, strides.channel};
}

}  // namespace

std::string why_not_cuda(const std::string& op, at::ScalarType dtype, int64_t head_dim, int64_t compute_capability) {
  if (compute_capability != 90) {
    return c10::str("backend cuda needs a Hopper GPU (compute capability 9.0), got ", compute_capability / 10, ".", compute_capability % 10);
  }
  const bool half_precision = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (op == "rope") {
    return half_precision || dtype == at::kFloat ? "" : c10::str("backend cuda rotates bfloat16, float16 and float32, got ", dtype);
  }
  if (!half_precision) return c10::str("backend cuda takes bfloat16 and float16, got ", dtype);
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    return c10::str("backend cuda takes a head_dim that is a multiple of 8 up to 256, got ", head_dim);
  }
  return "";
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptTensor& scale, const OptTensor& offset,
    const OptTensor& cu_seqlens, const OptTensor& cu_seqlens_k,
    std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic) {
  // The forward is deterministic, and needs no bound on the lengths but to know that queries are few.
  (void)max_seqlen_k, (void)deterministic;
  constexpr const char* kOp = "attention";
  const bool packed = cu_seqlens.has_value();
  check_qkv(kOp, q_in, k_in, v_in, packed);
  check_cu_seqlens(kOp, q_in, k_in, cu_seqlens, cu_seqlens_k);
  const int64_t rows = packed ? cu_seqlens->size(0) - 1 : q_in.size(0);  // batch rows or sequences
  const int64_t heads = q_in.size(-2), head_dim = q_in.size(-1);
  check_factor(kOp, "scale", scale, q_in, rows, true);
  check_factor(kOp, "offset", offset, q_in, rows, false);
  const auto [window_left, window_right] = window_bounds(kOp, causal, window);
  const double sigma = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  SEAL_CHECK(sigma > 0 && std::isfinite(sigma), kOp, "softmax_scale", "be positive and finite on the cuda backend", sigma);

  const c10::cuda::CUDAGuard guard(q_in.device());
  Tensor out = at::empty(q_in.sizes(), q_in.options());
  Tensor lse = packed ? at::empty({heads, q_in.size(0)}, q_in.options().dtype(at::kFloat))
                      : at::empty({q_in.size(0), heads, q_in.size(1)}, q_in.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  if (rows == 0) return {out.zero_(), lse.fill_(-INFINITY)};  // packed tokens that belong to no sequence

  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  const Tensor cu_q = packed ? cu_seqlens->contiguous() : Tensor();
  const Tensor cu_k = packed && cu_seqlens_k ? cu_seqlens_k->contiguous() : cu_q;
  const Tensor tile_counter = at::empty({1}, q.options().dtype(at::kInt));

  AttentionForwardParams params;
  params.q = describe(q);
  params.k = describe(k);
  params.v = describe(v);
  params.out = describe(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.scale = describe(scale, heads, head_dim);
  params.offset = describe(offset, heads, head_dim);
  params.cu_seqlens_q = packed ? cu_q.const_data_ptr<int32_t>() : nullptr;
  params.cu_seqlens_k = packed ? cu_k.const_data_ptr<int32_t>() : nullptr;
  params.sequences = static_cast<int32_t>(rows);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.softmax_scale = static_cast<float>(sigma);
  params.window_left = window_left;
  params.window_right = window_right;
  params.half = q.scalar_type() == at::kHalf;
  params.tile_counter = tile_counter.mutable_data_ptr<int32_t>();
  params.multiprocessors = launch_overrides().multiprocessors;
  if (attention_by_splits(params, packed ? max_seqlen.value_or(q.size(0)) : q.size(1))) return {out, lse};
  C10_CUDA_CHECK(launch_attention_forward(params, c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

}  // namespace seal
