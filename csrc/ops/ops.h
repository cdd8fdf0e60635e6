// The ops of seal_ops as C++ functions, one per schema of csrc/schemas.inc (docs/ops.md is their contract).
// The bodies for CUDA tensors stand in csrc/ops/*.cpp: check, guard, allocate, launch.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace seal {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& scale, const OptTensor& offset,
    const OptTensor& cu_seqlens, const OptTensor& cu_seqlens_k,
    std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const OptTensor& scale, const OptTensor& offset,
    const OptTensor& cos, const OptTensor& sin, const OptTensor& positions, const OptTensor& positions_k,
    const OptTensor& cu_seqlens, const OptTensor& cu_seqlens_k, std::array<bool, 5> needs, bool interleaved,
    std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic);

std::tuple<Tensor, Tensor> rope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
    const OptTensor& positions, const OptTensor& positions_k, bool interleaved, bool inverse);

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const OptTensor& positions, const OptTensor& positions_k, const OptTensor& scale, const OptTensor& offset,
    const OptTensor& cu_seqlens, const OptTensor& cu_seqlens_k, bool interleaved,
    std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> max_seqlen_k, bool deterministic);

// Why the sm_90a kernels cannot run `op` on these sizes, in one sentence; empty where they can. The one predicate
// both for choosing the backend and for refusing a forced one. `compute_capability` is major * 10 + minor.
std::string why_not_cuda(const std::string& op, at::ScalarType dtype, int64_t head_dim, int64_t compute_capability);

}  // namespace seal
