// seal::attention_backward for CUDA tensors: check, guard, allocate, launch.
#include "../cuda/attention_backward.h"
#include "../cuda/launch_overrides.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "checks.h"
#include "ops.h"

namespace seal {
namespace {

constexpr const char* kOp = "attention_backward";

BackwardTensor describe(const Tensor& t) {
  return {t.const_data_ptr(), t.dim() == 3 ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

// Positions [S] or [B, S] (packed [T]); absent: first, first + 1, ...
BackwardPositions describe_positions(const OptTensor& positions, int64_t first) {
  if (!positions) return {nullptr, 0, 0, first, false};
  const bool is_int64 = positions->scalar_type() == at::kLong;
  const int64_t batch_stride = positions->dim() == 2 && positions->size(0) > 1 ? positions->stride(0) : 0;
  return {positions->const_data_ptr(), batch_stride, positions->stride(-1), 0, is_int64};
}

void check_positions(const char* name, const OptTensor& positions, const Tensor& t, bool packed) {
  if (!positions) return;
  SEAL_CHECK(positions->scalar_type() == at::kInt || positions->scalar_type() == at::kLong, kOp, name, "be int32 or int64", positions->scalar_type());
  SEAL_CHECK(positions->device() == t.device(), kOp, name, "be on q's device", positions->device());
  const int64_t rows = t.size(-3);
  const bool ok = (positions->dim() == 1 || (!packed && positions->dim() == 2 && (positions->size(0) == t.size(0) || positions->size(0) == 1))) &&
                  positions->size(-1) == rows;
  SEAL_CHECK(ok, kOp, name, c10::str("have one position a token, [", rows, packed ? "]" : "] or the same per batch row"), positions->sizes());
}

// cos and sin as the kernels read them: one dtype of bf16, fp16, fp32, last stride 1.
Tensor table(const Tensor& t, at::ScalarType dtype) {
  const Tensor converted = t.to(dtype);
  return converted.stride(-1) == 1 || converted.size(-1) <= 1 ? converted : converted.contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_in, const OptTensor& grad_lse_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const OptTensor& scale, const OptTensor& offset,
    const OptTensor& cos, const OptTensor& sin, const OptTensor& positions, const OptTensor& positions_k,
    const OptTensor& cu_seqlens, const OptTensor& cu_seqlens_k, std::array<bool, 5> needs, bool interleaved,
    std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic) {
  (void)max_seqlen, (void)max_seqlen_k;  // the grid comes from the totals and the number of sequences
  const bool packed = cu_seqlens.has_value();
  check_qkv(kOp, q_in, k_in, v_in, packed);
  check_cu_seqlens(kOp, q_in, k_in, cu_seqlens, cu_seqlens_k);
  const int64_t rows = packed ? cu_seqlens->size(0) - 1 : q_in.size(0);  // batch rows or sequences
  const int64_t heads = q_in.size(-2), head_dim = q_in.size(-1), seqlen_q = q_in.size(-3), seqlen_k = k_in.size(-3);
  check_factor(kOp, "scale", scale, q_in, rows, true);
  check_factor(kOp, "offset", offset, q_in, rows, false);
  const auto [window_left, window_right] = window_bounds(kOp, causal, window);
  const double sigma = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  SEAL_CHECK(sigma > 0 && std::isfinite(sigma), kOp, "softmax_scale", "be positive and finite on the cuda backend", sigma);
  const std::pair<const char*, const Tensor&> like_q[] = {{"grad_out", grad_out_in}, {"out", out_in}};
  for (const auto& [name, t] : like_q) {
    SEAL_CHECK(t.sizes() == q_in.sizes(), kOp, name, "have q's shape", t.sizes());
    SEAL_CHECK(t.scalar_type() == q_in.scalar_type() && t.device() == q_in.device(), kOp, name, "have q's dtype and device", t.scalar_type());
  }
  const auto check_lse = [&](const char* name, const Tensor& t) {
    const bool ok = packed ? t.sizes() == at::IntArrayRef({heads, seqlen_q}) : t.sizes() == at::IntArrayRef({rows, heads, seqlen_q});
    SEAL_CHECK(ok, kOp, name, packed ? "have shape [heads, tokens]" : "have shape [batch, heads, seqlen]", t.sizes());
    SEAL_CHECK(t.scalar_type() == at::kFloat && t.device() == q_in.device(), kOp, name, "be float32 on q's device", t.scalar_type());
  };
  check_lse("lse", lse_in);
  if (grad_lse_in) check_lse("grad_lse", *grad_lse_in);
  SEAL_CHECK(cos.has_value() == sin.has_value(), kOp, "sin", "come with cos", sin ? "no cos" : "None");
  if (cos) {
    SEAL_CHECK(sin->sizes() == cos->sizes(), kOp, "sin", "have cos' shape", sin->sizes());
    SEAL_CHECK(cos->dim() == 2 || (!packed && cos->dim() == 3 && (cos->size(0) == rows || cos->size(0) == 1)), kOp, "cos",
               "be a table [N, R/2] or gathered values [B, S, R/2]", cos->sizes());
    SEAL_CHECK(2 * cos->size(-1) <= head_dim, kOp, "cos", c10::str("turn at most head_dim = ", head_dim, " channels"), 2 * cos->size(-1));
    SEAL_CHECK(cos->is_floating_point() && sin->is_floating_point() && cos->device() == q_in.device() && sin->device() == q_in.device(), kOp, "cos",
               "be floating point on q's device, as sin", cos->scalar_type());
    check_positions("positions", positions, q_in, packed);
    check_positions("positions_k", positions_k, k_in, packed);
    SEAL_CHECK(!positions || positions_k || seqlen_q == seqlen_k, kOp, "positions_k", "be given where k and q differ in length", "None");
  }

  const c10::cuda::CUDAGuard guard(q_in.device());
  const auto floats = q_in.options().dtype(at::kFloat);
  Tensor grad_q = needs[0] ? at::empty(q_in.sizes(), q_in.options()) : at::empty({0}, q_in.options());
  Tensor grad_k = needs[1] ? at::empty(k_in.sizes(), q_in.options()) : at::empty({0}, q_in.options());
  Tensor grad_v = needs[2] ? at::empty(v_in.sizes(), q_in.options()) : at::empty({0}, q_in.options());
  Tensor grad_scale = needs[3] && scale ? at::empty(scale->sizes(), floats) : at::empty({0}, floats);
  Tensor grad_offset = needs[4] && offset ? at::empty(offset->sizes(), floats) : at::empty({0}, floats);
  if (rows == 0 || heads == 0) return {grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_scale.zero_(), grad_offset.zero_()};

  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in), out = aligned(out_in), grad_out = aligned(grad_out_in);
  const Tensor lse = lse_in.contiguous(), grad_lse = grad_lse_in ? grad_lse_in->contiguous() : Tensor();
  const Tensor cu_q = packed ? cu_seqlens->contiguous() : Tensor();
  const Tensor cu_k = packed && cu_seqlens_k ? cu_seqlens_k->contiguous() : cu_q;
  const Tensor offsets = offset ? (offset->stride(-1) == 1 || head_dim == 1 ? *offset : offset->contiguous()) : Tensor();

  AttentionBackwardParams p{};
  p.batch = static_cast<int32_t>(rows);
  p.seqlen_q = static_cast<int32_t>(seqlen_q);
  p.seqlen_k = static_cast<int32_t>(seqlen_k);
  p.heads_q = static_cast<int32_t>(heads);
  p.heads_k = static_cast<int32_t>(k.size(-2));
  p.head_dim = static_cast<int32_t>(head_dim);
  p.cu_seqlens_q = packed ? cu_q.const_data_ptr<int32_t>() : nullptr;
  p.cu_seqlens_k = packed ? cu_k.const_data_ptr<int32_t>() : nullptr;
  p.half = q.scalar_type() == at::kHalf;
  p.deterministic = deterministic;
  p.multiprocessors = launch_overrides().multiprocessors;
  p.enough_ctas = launch_overrides().enough_ctas;
  p.window_left = window_left;
  p.window_right = window_right;
  p.softmax_scale = static_cast<float>(sigma);
  p.q = describe(q);
  p.k = describe(k);
  p.v = describe(v);
  p.out = describe(out);
  p.grad_out = describe(grad_out);
  p.lse = lse.const_data_ptr<float>();
  p.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr;
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
  Tensor cos_table, sin_table;
  if (cos && (needs[0] || needs[1])) {
    const bool as_is = cos->scalar_type() == sin->scalar_type() &&
                       (cos->scalar_type() == at::kBFloat16 || cos->scalar_type() == at::kHalf || cos->scalar_type() == at::kFloat);
    const at::ScalarType dtype = as_is ? cos->scalar_type() : at::kFloat;
    cos_table = table(*cos, dtype), sin_table = table(*sin, dtype);
    const auto batch_stride = [](const Tensor& t) { return t.dim() == 3 && t.size(0) > 1 ? t.stride(0) : 0; };
    p.cos = cos_table.const_data_ptr();
    p.sin = sin_table.const_data_ptr();
    p.cos_type = dtype == at::kBFloat16 ? 0 : dtype == at::kHalf ? 1 : 2;
    p.rotary_dim = static_cast<int32_t>(2 * cos->size(-1));
    p.cos_batch_stride = batch_stride(cos_table);
    p.cos_row_stride = cos_table.stride(-2);
    p.sin_batch_stride = batch_stride(sin_table);
    p.sin_row_stride = sin_table.stride(-2);
    p.cos_rows = cos_table.size(-2);
    p.interleaved = interleaved;
    p.positions_q = describe_positions(positions, packed ? 0 : std::max<int64_t>(0, seqlen_k - seqlen_q));
    p.positions_k = describe_positions(positions_k ? positions_k : positions, 0);
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
  return {grad_q, grad_k, grad_v, grad_scale, grad_offset};
}

}  // namespace seal
