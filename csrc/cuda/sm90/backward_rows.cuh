// The memory-bound kernels around the main one: per-row vectors and offset gradient before it, accumulator tiles to
// tensors and sums of partial results after it.
#pragma once

#include "backward_store.cuh"

namespace seal::sm90 {

constexpr int kRowThreads = 256, kSumThreads = 1024;
constexpr uint32_t kBarrierChannels = 1;  // named barrier of the threads that add up the channels

// delta = rowsum(g * (out - offset)) - grad_lse, lse2 = lse * log2(e), scale * g, zeros in dq, column sums of g and g * out. One
// thread block: kTileRows rows of one head. kScaled: there is a scale. Rows past the end and rows that see no key get lse2 = +inf, hence
// probabilities 0, and delta 0.
template <class T, int kD, bool kScaled>
__global__ void __launch_bounds__(kRowThreads, kScaled ? 3 : 4) attention_backward_rows(const __grid_constant__ BackwardKernelParams p) {
  constexpr int kLanes = kD / 8, kRowsAtOnce = kRowThreads / kLanes;  // lanes of a row: 16 bytes each
  __shared__ float sums[kRowsAtOnce][kD], row_delta[kTileRows];
  launch_dependents();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.task_counter = 0;
  const bool packed = p.cu_seqlens_q != nullptr;
  // Heads of the same rows lie beside each other in memory: neighbouring thread blocks take them.
  const int place = blockIdx.x / p.heads_q, head = blockIdx.x % p.heads_q;
  const int batch_row = packed ? 0 : place / p.tiles_q;
  int tile;
  const Sequence seq = locate(p, p.cu_seqlens_q, kTileRows, packed ? place : place % p.tiles_q, batch_row, &tile);
  const int first = tile * kTileRows, rows = max(0, min(kTileRows, seq.length_q - first));
  const int lane = threadIdx.x % kLanes, channel = lane * 8;
  const int64_t partial_at = (static_cast<int64_t>(place) * p.heads_q + head) * kD;
  // Columns summed over the rows of the thread block, from the sums of each thread's rows.
  const auto add_up = [&](const float (&sum)[8], float* partial) {
    if (partial == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[threadIdx.x / kLanes][channel + i] = sum[i];
    __syncthreads();
    for (int c = threadIdx.x; c < kD; c += kRowThreads) {
      float total = 0.f;
      for (int r = 0; r < kRowsAtOnce; ++r) total += sums[r][c];
      partial[partial_at + c] = total;
    }
    __syncthreads();
  };

  float g_sum[8] = {}, product_sum[8] = {};
  if (rows > 0) {
    const int64_t padded = head * p.padded_rows_q + seq.padded_q + first;
    if (p.dq != nullptr) {
      float4* const out = reinterpret_cast<float4*>(p.dq + padded * kD);
#pragma unroll
      for (int i = 0; i < kTileRows * kD / 4 / kRowThreads; ++i) out[i * kRowThreads + threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    if constexpr (kD < 256) {
      constexpr int kCounters = 2 * kTileRows / step_rows(kD);
      if (p.added != nullptr && threadIdx.x < kCounters) p.added[padded / kTileRows * kCounters + threadIdx.x] = 0;
    }
    const bool inside = channel < p.head_dim;
    float offset[8] = {}, scale[8];
    if (p.offset != nullptr && inside) {
#pragma unroll
      for (int i = 0; i < 8; ++i) offset[i] = p.offset[seq.index * p.offset_batch_stride + head * p.offset_head_stride + channel + i];
    }
    if (kScaled && inside) {
      const float* const from = p.scale + seq.index * p.scale_batch_stride + head * p.scale_head_stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) scale[i] = from[(channel + i) * p.scale_channel_stride];
    }
    const T* const g_first = static_cast<const T*>(p.grad_out.data) + batch_row * p.grad_out.batch_stride + head * p.grad_out.head_stride + channel;
    const T* const o_first = static_cast<const T*>(p.out.data) + batch_row * p.out.batch_stride + head * p.out.head_stride + channel;
    T* const scaled_first = static_cast<T*>(p.scaled_grad) + (static_cast<int64_t>(batch_row) * p.seqlen_q * p.heads_q + head) * p.head_dim + channel;
#pragma unroll 4
    for (int r = threadIdx.x / kLanes; r < kTileRows; r += kRowsAtOnce) {
      float delta = 0.f;
      if (r < rows && inside) {
        const int64_t token = seq.first_q + first + r;
        const uint4 g4 = *reinterpret_cast<const uint4*>(g_first + token * p.grad_out.row_stride);
        const uint4 o4 = *reinterpret_cast<const uint4*>(o_first + token * p.out.row_stride);
        const uint32_t g[4] = {g4.x, g4.y, g4.z, g4.w}, o[4] = {o4.x, o4.y, o4.z, o4.w};
        uint32_t scaled[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 gx = unpack<T>(g[i]), ox = unpack<T>(o[i]);
          delta += gx.x * (ox.x - offset[2 * i]) + gx.y * (ox.y - offset[2 * i + 1]);
          g_sum[2 * i] += gx.x;
          g_sum[2 * i + 1] += gx.y;
          if (!kScaled) continue;
          product_sum[2 * i] += gx.x * ox.x;
          product_sum[2 * i + 1] += gx.y * ox.y;
          scaled[i] = pack<T>(gx.x * scale[2 * i], gx.y * scale[2 * i + 1]);
        }
        if (kScaled && p.scaled_grad != nullptr) {
          *reinterpret_cast<uint4*>(scaled_first + token * p.heads_q * p.head_dim) = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
        }
      }
      if (p.lse2 == nullptr) continue;
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
      if (lane == 0) row_delta[r] = delta;
    }
    __syncthreads();
    if (p.lse2 != nullptr && threadIdx.x < kTileRows) {
      const int r = threadIdx.x;
      float lse2 = INFINITY, delta = 0.f;
      if (r < rows) {
        const int64_t token = seq.first_q + first + r;
        const int64_t at = packed ? head * static_cast<int64_t>(p.seqlen_q) + token : (static_cast<int64_t>(batch_row) * p.heads_q + head) * p.seqlen_q + token;
        const float lse = p.lse[at];
        if (lse != -INFINITY) {
          lse2 = lse * kLog2e;
          delta = row_delta[r] - (p.grad_lse != nullptr ? p.grad_lse[at] : 0.f);
        }
      }
      p.lse2[padded + place_in_vector(r)] = lse2;
      p.delta[padded + place_in_vector(r)] = delta;
    }
  }
  add_up(g_sum, p.doffset_partial);
  if (kScaled) add_up(product_sum, p.dscale_partial);
}

// Tiles of kRows x kD in accumulator order, summed over `count` slices, to rows of a tensor. kSplitRows: the second
// warpgroup holds the second half of the rows, else the second half of the columns.
struct AccumulatorTiles {
  const float* data;          // [count][heads, rows / kRows, kRows * kD]
  int64_t slice_stride, head_stride;
  int32_t count, heads;
  bool of_queries;            // else of keys
  void* output;
  float factor;
  bool rotate;
};

template <class T, int kD, int kRows, bool kSplitRows>
__global__ void __launch_bounds__(kRowThreads, 2)
    attention_backward_tiles(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ AccumulatorTiles t) {
  extern __shared__ float tile[];  // [kRows][kD + kPad]
  constexpr int kColumns = kSplitRows ? kD : kD / 2;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int tile_rows = t.of_queries ? kTileRows : p.key_rows, parts = tile_rows / kRows;
  const int place = blockIdx.x / t.heads, head = blockIdx.x % t.heads;
  const int big = place / parts, part = place % parts;
  const int tiles = t.of_queries ? p.tiles_q : p.tiles_k;
  const int batch_row = packed ? 0 : big / tiles;
  launch_dependents();
  wait_for_dependencies();
  int local;
  const Sequence seq = locate(p, t.of_queries ? p.cu_seqlens_q : p.cu_seqlens_k, tile_rows, packed ? big : big % tiles, batch_row, &local);
  const int first = local * tile_rows + part * kRows;
  const int rows = (t.of_queries ? seq.length_q : seq.length_k) - first;
  if (rows <= 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t at = head * t.head_stride + static_cast<int64_t>(place) * kRows * kD;
  const int row = (kSplitRows ? warp : warp % 4) * 16 + lane / 4, column = (kSplitRows ? 0 : warp / 4 * kColumns) + lane % 4 * 2;
  constexpr int kBatch = 8;  // vectors a thread reads before it uses any
#pragma unroll
  for (int batch = 0; batch < kColumns / 8; batch += kBatch) {
    const float4* const from = reinterpret_cast<const float4*>(t.data + at) + (warp * (kColumns / 8) + batch) * 32 + lane;
    float4 x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] = from[i * 32];
    for (int slice = 1; slice < t.count; ++slice) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4 y = from[i * 32 + slice * (t.slice_stride / 4)];
        x[i] = make_float4(x[i].x + y.x, x[i].y + y.y, x[i].z + y.z, x[i].w + y.w);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float* const to = tile + row * (kD + kPad) + column + 8 * (batch + i);
      *reinterpret_cast<float2*>(to) = make_float2(x[i].x, x[i].y);
      *reinterpret_cast<float2*>(to + 8 * (kD + kPad)) = make_float2(x[i].z, x[i].w);
    }
  }
  __syncthreads();
  constexpr int kWarpRows = kRows / 8;
  store_rows<T, kD>(p, tile + warp * kWarpRows * (kD + kPad), min(kWarpRows, rows - warp * kWarpRows), t.output,
                    (t.of_queries ? seq.first_q : seq.first_k) + first + warp * kWarpRows, batch_row, t.of_queries ? p.seqlen_q : p.seqlen_k,
                    head, t.heads, t.factor, t.rotate, t.of_queries ? p.positions_q : p.positions_k);
}

// Gradient of the scale or the offset: partial sums [tile, head, channel] added over the tiles (of one batch row where
// per_batch) in a fixed order, and over the channels where not per_channel. One thread block: one head, one batch row.
enum class FactorGradient { kScale, kOffset };

template <int kD, FactorGradient kOf>
__global__ void __launch_bounds__(kSumThreads)
    attention_backward_sum(const __grid_constant__ BackwardKernelParams p, float* output, bool per_batch, bool per_channel) {
  constexpr int kGroups = kSumThreads / kD;
  __shared__ float sums[kGroups][kD];
  launch_dependents();
  wait_for_dependencies();
  const int head = blockIdx.x, group = threadIdx.x / kD, channel = threadIdx.x % kD;
  const bool exact = kOf == FactorGradient::kScale && needs_exact_dscale(p, blockIdx.y, head);
  const float* const partial = kOf == FactorGradient::kOffset ? p.doffset_partial : exact ? p.dscale_exact : p.dscale_partial;
  const int32_t* const cu = exact ? p.cu_seqlens_k : p.cu_seqlens_q;
  int64_t first = 0, last = exact ? p.tile_count_k : p.tile_count_q;
  if (per_batch && cu != nullptr) {
    const int b = blockIdx.y, rows = exact ? p.key_rows : kTileRows;
    first = cu[b] / rows + b;
    last = first + (cu[b + 1] - cu[b] + rows - 1) / rows;
  } else if (per_batch) {
    const int tiles = exact ? p.tiles_k : p.tiles_q;
    first = static_cast<int64_t>(blockIdx.y) * tiles;
    last = first + tiles;
  }
  float sum = 0.f;
#pragma unroll 4
  for (int64_t tile = first + group; tile < last; tile += kGroups) sum += partial[(tile * p.heads_q + head) * kD + channel];
  sums[group][channel] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < kGroups; ++g) sum += sums[g][channel];
  if (kOf == FactorGradient::kScale && !exact && channel < p.head_dim) {
    sum /= p.scale[blockIdx.y * p.scale_batch_stride + head * p.scale_head_stride + channel * p.scale_channel_stride];
  }
  const int64_t at = static_cast<int64_t>(blockIdx.y) * p.heads_q + head;
  if (per_channel) {
    if (channel < p.head_dim) output[at * p.head_dim + channel] = sum;
    return;
  }
  sums[0][channel] = channel < p.head_dim ? sum : 0.f;
  named_sync(kBarrierChannels, kD);
  if (channel != 0) return;
  float total = 0.f;
  for (int c = 0; c < kD; ++c) total += sums[0][c];
  output[at] = total;
}

}  // namespace seal::sm90
