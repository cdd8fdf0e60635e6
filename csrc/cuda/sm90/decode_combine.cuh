// The combining kernel of decoding: one thread block puts the partial results of one query and head together, weighted by their
// log-sum-exp, and applies scale and offset. A few hundred kB out of L2: it costs its launch and two round trips.
#pragma once

#include "decode_kernel.cuh"

namespace seal::sm90 {

constexpr int kMaxDecodeSplits = 512;
constexpr int kCombineThreads = 256;

// Reduces over the thread block; `scratch` holds a float a warp and is free again on return.
template <class Reduce>
SEAL_DEVICE float reduce_block(float value, float* scratch, Reduce reduce) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = reduce(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kCombineThreads / 32; ++warp) value = reduce(value, scratch[warp]);
  __syncthreads();
  return value;
}

// Sequence of packed token `token`: the last one that begins at or before it (of empty ones at the same place, the last).
SEAL_DEVICE int sequence_of(const Sequences& s, int token) {
  int low = 0, high = s.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (s.cu_seqlens_q[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kCombineThreads) attention_decode_combine(const __grid_constant__ DecodeArguments a) {
  constexpr int kQuads = kHeadDim / 4, kGroups = kCombineThreads / kQuads;  // of four channels; of splits that are read side by side
  __shared__ float weights[kMaxDecodeSplits];
  __shared__ float scratch[kCombineThreads / 32];
  __shared__ float4 sums[kGroups][kQuads];
  const int heads = a.kv_heads * a.group;
  const int64_t row = blockIdx.x;  // of [rows of q][heads]
  const int head = static_cast<int>(row % heads);
  const int64_t token = row / heads;
  const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
  const bool here = 4 * quad < a.head_dim;
  wait_for_dependencies();

  float lse[kMaxDecodeSplits / kCombineThreads], top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMaxDecodeSplits / kCombineThreads; ++i) {
    const int split = threadIdx.x + i * kCombineThreads;
    lse[i] = split < a.splits ? a.partial_lse[row * a.splits + split] : -INFINITY;
    top = fmaxf(top, lse[i]);
  }
  top = reduce_block(top, scratch, [](float x, float y) { return fmaxf(x, y); });
  const float base = top == -INFINITY ? 0.f : top;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kMaxDecodeSplits / kCombineThreads; ++i) {
    const float weight = exp2_approx((lse[i] - base) * kLog2e);
    weights[threadIdx.x + i * kCombineThreads] = weight;
    total += weight;
  }
  total = reduce_block(total, scratch, [](float x, float y) { return x + y; });

  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (here) {
    const float* const from = a.partial_out + row * a.splits * a.head_dim + 4 * quad;
#pragma unroll 4
    for (int split = group; split < a.splits; split += kGroups) {
      const float4 part = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(split) * a.head_dim);
      const float weight = weights[split];
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
  }
  sums[group][quad] = sum;
  __syncthreads();
  if (group != 0 || !here) return;
#pragma unroll
  for (int other = 1; other < kGroups; ++other) {
    const float4 part = sums[other][quad];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  const bool empty = total == 0.f;
  const float inverse = empty ? 0.f : __fdividef(1.f, total);
  const float o[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
  const bool packed = a.sequences.packed();
  const int64_t batch = packed ? 0 : token / a.sequences.length_q;
  const int64_t query = packed ? token : token % a.sequences.length_q;
  const bool per_sequence = a.scale.batch_stride != 0 || a.offset.batch_stride != 0;
  const int64_t sequence = !packed ? batch : per_sequence ? sequence_of(a.sequences, static_cast<int>(token)) : 0;
  T* const to = static_cast<T*>(const_cast<void*>(a.out.data)) + batch * a.out.batch_stride + query * a.out.row_stride + head * a.out.head_stride + 4 * quad;
  store_scaled<T>(to, o, a.scale, a.offset, sequence, head, 4 * quad);
  if (quad == 0) a.lse[head * a.lse_head_stride + batch * a.lse_sequence_stride + query] = empty ? -INFINITY : base + log2_approx(total) * kLn2;
}

}  // namespace seal::sm90
