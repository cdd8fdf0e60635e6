// Rotary position embedding of Q and K in one launch. No framework header: the host code in csrc/ops/rope.cpp fills
// these structs from tensors, a test or a benchmark may fill them from anything else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace seal {

enum class RopeType : int { bf16 = 0, fp16 = 1, fp32 = 2 };

struct RopeOperand {
  const void* in;                             // [batch, seqlen, heads, head_dim], last stride 1
  void* out;                                  // the same shape, contiguous
  int64_t batch_stride, token_stride, head_stride;  // of `in`, in elements
  int32_t seqlen, heads;
  const void* positions;                      // [batch, seqlen], or null: first_position + token
  int64_t positions_batch_stride, positions_token_stride;  // in elements
  int64_t first_position;
};

struct RopeParams {
  RopeOperand q, k;
  bool joint;                                 // q and k have one seqlen and one set of positions: cos and sin are read once for both
  int32_t batch, head_dim, rotary_dim;        // the first rotary_dim channels turn, the rest are copied
  const void *cos, *sin;                      // [batch, rows, rotary_dim / 2], last stride 1
  int64_t cos_batch_stride, sin_batch_stride;  // in elements; 0 where all batch rows share one table
  int64_t cos_row_stride, sin_row_stride;     // in elements
  int64_t cos_rows;                           // a position outside [0, cos_rows) turns its token into NaN
  RopeType type, cos_type;                    // of q, k and their outputs; of cos and sin
  bool positions_int64;                       // else int32
  bool interleaved;                           // pairs (2c, 2c + 1), else (c, c + rotary_dim / 2)
  bool inverse;                               // rotate by the negative angle
};

// Fails with cudaErrorInvalidValue where batch * seqlen does not fit in 31 bits; else returns the launch's status.
cudaError_t launch_rope(const RopeParams& params, cudaStream_t stream);

}  // namespace seal
