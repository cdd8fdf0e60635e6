// Attention forward for Hopper: out = scale * softmax(Q K^T) V + offset, and the log-sum-exp.
//
// One thread block per multiprocessor, persistent. Warpgroup 0 produces: its warp 0 runs the copy engine, its warp 1 picks
// tiles and fetches the scale rows. The other warpgroups consume: each owns 64 query rows of the tile and walks the
// key blocks from the last to the first, so that masked blocks come first. A consumer issues S' = Q K'^T of the next block,
// then O += P V of the present one, and does the softmax of S' from then on; the consumers take turns at issuing, so that
// one's softmax falls under the other's products. O leaves through the shared memory of Q or V.
#pragma once

#include "forward_consumer.cuh"
#include "forward_producer.cuh"

#include <algorithm>

namespace seal::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_forward(const __grid_constant__ Maps maps, const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<Config>*>(memory);
  const int warp = warp_uniform(threadIdx.x / 32);

  if (warp == 0 && elect_one()) {
    if (smem_address(memory) % 1024 != 0) __trap();  // the copy engine's swizzle counts from there
    shared.init_barriers();
    fence_barrier_init();
    prefetch_map(&maps.q);
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
    prefetch_map(&maps.out);
  }
  const int present = Config::present_slabs(arguments.head_dim);
  if (present < slabs(Config::kHeadDim)) {
    zero_absent_slabs<Config::kQRows, Config::kHeadDim>(shared.q, Config::kQStages * Config::kWarpgroups, present, threadIdx.x, Config::kThreads);
    zero_absent_slabs<Config::kBlockN, Config::kHeadDim>(shared.k, Config::kKStages, present, threadIdx.x, Config::kThreads);
    zero_absent_slabs<Config::kBlockN, Config::kHeadDim>(shared.v, Config::kVStages, present, threadIdx.x, Config::kThreads);
    fence_proxy_async();
  }
  __syncthreads();

  if (warp < 4) {
    registers_shrink<Config::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) produce_operands<Config>(shared, maps, arguments);
    } else if (warp == 1) {
      produce_tiles<Config>(shared, arguments);
    }
  } else {
    registers_grow<Config::kConsumerRegisters>();
    Consumer<Config>(shared, maps, arguments, warp / 4 - 1).run();
  }
}

inline TileSource tile_source(const AttentionTensor& t, int head_dim) {
  return {t.data, t.batch, t.rows, t.heads, head_dim, t.batch_stride, t.row_stride, t.head_stride};
}

template <class Config>
cudaError_t launch(const AttentionForwardParams& p, cudaStream_t stream) {
  const bool packed = p.cu_seqlens_q != nullptr;
  Maps maps;
  const auto make = [&](CUtensorMap* map, const AttentionTensor& tensor, int box_rows) {
    TileSource source = tile_source(tensor, p.head_dim);
    if (source.rows == 0) source = {p.q.data, 1, 1, 1, p.head_dim, 0, 0, 0};  // no keys: never loaded, yet a map is required
    return tma_ready(source) ? make_tile_map(map, source, p.half, packed, box_rows) : cudaErrorInvalidValue;
  };
  cudaError_t status = make(&maps.q, p.q, Config::kQRows);
  if (status == cudaSuccess) status = make(&maps.k, p.k, Config::kBlockN);
  if (status == cudaSuccess) status = make(&maps.v, p.v, Config::kBlockN);
  if (status == cudaSuccess) status = make(&maps.out, p.out, 16);

  int device = 0, multiprocessors = 0;
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (p.multiprocessors > 0) multiprocessors = p.multiprocessors;
  constexpr int kSharedBytes = sizeof(Shared<Config>);
  static_assert(kSharedBytes <= 227 * 1024, "a thread block on sm_90 has at most 227 KB of shared memory");
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(attention_forward<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (status != cudaSuccess) return status;

  // Upper bound where packed: the lengths are known to the device only.
  const int64_t blocks = packed ? p.q.rows / Config::kBlockM + p.sequences
                                : (p.q.rows + Config::kBlockM - 1) / Config::kBlockM * p.sequences;
  const int64_t tiles = blocks * p.q.heads;
  if (tiles + multiprocessors > INT32_MAX) return cudaErrorInvalidValue;
  const int grid = static_cast<int>(std::min<int64_t>(tiles, multiprocessors));

  Arguments arguments;
  arguments.sequences = {p.cu_seqlens_q, p.cu_seqlens_k, p.sequences, static_cast<int>(p.q.rows), static_cast<int>(p.k.rows),
                         p.mask.within(p.q.rows, p.k.rows)};
  arguments.heads = static_cast<int>(p.q.heads);
  arguments.kv_heads = static_cast<int>(p.k.heads);
  arguments.head_dim = p.head_dim;
  arguments.scale_log2 = p.softmax_scale * kLog2e;
  arguments.scale = p.scale;
  arguments.offset = p.offset;
  arguments.lse = p.lse;
  arguments.lse_head_stride = p.q.rows;
  arguments.lse_sequence_stride = p.q.heads * p.q.rows;
  arguments.zero = 0;
  // Equal tiles are dealt out in turn; unequal ones are claimed, for which the counter must be zero.
  const bool equal = !packed && p.mask.is_band() && -p.mask.lower >= p.k.rows - 1 && p.mask.upper >= p.q.rows - 1;
  arguments.tile_counter = equal || tiles <= grid ? nullptr : p.tile_counter;
  if (arguments.tile_counter != nullptr) {
    status = cudaMemsetAsync(arguments.tile_counter, 0, sizeof(int), stream);
    if (status != cudaSuccess) return status;
  }
  attention_forward<Config><<<grid, Config::kThreads, kSharedBytes, stream>>>(maps, arguments);
  return cudaGetLastError();
}

template <class T, Masking kMasking>
cudaError_t launch_for_head_dim(const AttentionForwardParams& p, cudaStream_t stream) {
  //                                              head_dim, keys, warpgroups, stages of K, V, Q
  // Masks with chunks or sinks take more registers than three warpgroups leave each other at head_dim 64 (ptxas: C7511).
  constexpr int kSmallWarpgroups = kMasking == Masking::kBand ? 3 : 2;
  if (p.head_dim <= 64) return launch<ForwardConfig<T, 64, 128, kSmallWarpgroups, 4, 4, 2, kMasking>>(p, stream);
  if (p.head_dim <= 128) return launch<ForwardConfig<T, 128, 128, 2, 2, 3, 2, kMasking>>(p, stream);
  return launch<ForwardConfig<T, 256, 80, 2, 2, 2, 1, kMasking>>(p, stream);
}

// Calls whose mask kMasking stands for. attention_forward*.cu instantiate it, so that they compile side by side.
template <Masking kMasking>
cudaError_t launch_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  return p.half ? launch_for_head_dim<__half, kMasking>(p, stream) : launch_for_head_dim<__nv_bfloat16, kMasking>(p, stream);
}

}  // namespace seal::sm90
