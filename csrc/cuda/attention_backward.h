// Gradients of attention with an output scale: S = softmax_scale Q K^T, out = scale * (softmax(S) V) + offset.
// No framework header: csrc/ops/attention_backward.cpp fills the struct from tensors, a test may fill it from anything.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "mask.h"

namespace seal {

// A 16-bit tensor [batch, rows, heads, head_dim] (packed: batch 1, rows = all tokens), strides in elements, last stride 1.
struct BackwardTensor {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// Where the tokens of one tensor stand in the tables of cos and sin.
struct BackwardPositions {
  const void* data;  // int32 or int64, or null: first + token
  int64_t batch_stride, token_stride, first;
  bool is_int64;
};

struct AttentionBackwardParams {
  // ---- sizes. Packed sequences: batch counts sequences, seqlen_q and seqlen_k are the totals of tokens.
  int32_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1], null where dense
  bool half;                                   // fp16, else bf16
  bool deterministic;
  int32_t multiprocessors;                     // CTAs of a persistent grid; 0: as the device has multiprocessors
  int32_t enough_ctas;                         // CTAs of the main kernel that several heads to a CTA must leave; 0: as the device wants
  Mask mask;
  float softmax_scale;

  // ---- inputs. q, k, v and grad_out: 16-byte aligned data and strides (tma_ready).
  BackwardTensor q, k, v, out, grad_out;
  const float* lse;       // [batch, heads_q, seqlen_q], packed [heads_q, seqlen_q]
  const float* grad_lse;  // the same, or null
  const float* scale;     // null: 1; strides 0 where broadcast
  int64_t scale_batch_stride, scale_head_stride, scale_channel_stride;
  const float* offset;    // null: 0; last stride 1
  int64_t offset_batch_stride, offset_head_stride;

  // ---- inverse rotation of grad_q and grad_k; cos null: none
  const void *cos, *sin;  // [batch or 1, rows, rotary_dim / 2], last stride 1
  int32_t cos_type;       // 0 bf16, 1 fp16, 2 fp32
  int32_t rotary_dim;
  int64_t cos_rows;       // a position outside [0, cos_rows) turns its row into NaN
  int64_t cos_batch_stride, cos_row_stride, sin_batch_stride, sin_row_stride;
  bool interleaved;
  BackwardPositions positions_q, positions_k;

  // ---- outputs, contiguous [batch, rows, heads, head_dim]; null: not needed, not computed
  void *grad_q, *grad_k, *grad_v;
  float* grad_scale;   // [batch or 1, heads_q, head_dim or 1] as the two flags say
  bool grad_scale_per_batch, grad_scale_per_channel;
  float* grad_offset;  // [batch or 1, heads_q, head_dim]
  bool grad_offset_per_batch;

  void* workspace;     // attention_backward_workspace(params) bytes, 256-byte aligned, any contents
};

// Bytes of workspace; reads sizes, flags and which outputs are null.
size_t attention_backward_workspace(const AttentionBackwardParams& params);

// Launches everything on `stream`: no allocation, no synchronisation, fit for graph capture.
cudaError_t launch_attention_backward(const AttentionBackwardParams& params, cudaStream_t stream);

}  // namespace seal
