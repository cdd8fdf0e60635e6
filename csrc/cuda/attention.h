// Attention forward on sm_90a. No framework header: the host code in csrc/ops/attention.cpp fills these structs from
// tensors, a test or a benchmark may fill them from anything else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mask.h"

namespace seal {

// q, k, v or out: dense [batch, rows, heads, head_dim], or packed [rows, heads, head_dim] (batch = 1). Strides in elements,
// the last one is 1. On Hopper data and strides must be multiples of 16 bytes (launch fails with cudaErrorInvalidValue).
struct AttentionTensor {
  const void* data;
  int64_t batch, rows, heads;
  int64_t batch_stride, row_stride, head_stride;
};

// A factor or summand per output channel, read at batch * batch_stride + head * head_stride + channel * channel_stride;
// strides of 0 broadcast. data may be null: 1 for a scale, 0 for an offset.
struct ChannelTensor {
  const float* data;
  int64_t batch_stride, head_stride, channel_stride;
};

struct AttentionForwardParams {
  AttentionTensor q, k, v, out;
  float* lse;                     // [batch, heads, rows of q], or packed [heads, rows of q]
  ChannelTensor scale, offset;    // "batch" is the sequence where packed
  const int32_t* cu_seqlens_q;    // [sequences + 1] on the device; null: dense
  const int32_t* cu_seqlens_k;    // given with cu_seqlens_q
  int32_t sequences;              // batch rows, or packed sequences
  int32_t head_dim;               // of all four tensors; a multiple of 8, at most 256
  float softmax_scale;            // > 0
  Mask mask;
  bool half;                      // fp16, else bf16
  int32_t* tile_counter;          // 4 bytes of device memory, any contents; the launch resets it in the stream
  int32_t multiprocessors = 0;    // thread blocks at most; 0: one on each multiprocessor of the device
};

// Launches on the current device. Returns the first error of making the tensor maps or of the launch.
cudaError_t launch_attention_forward(const AttentionForwardParams& params, cudaStream_t stream);

}  // namespace seal
