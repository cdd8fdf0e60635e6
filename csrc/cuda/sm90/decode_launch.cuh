// Host side of decoding for one configuration: the number of splits, the arguments, the two launches.
#pragma once

#include "../attention_decode.h"
#include "decode_combine.cuh"

#include <algorithm>

namespace seal::sm90 {

// Row tiles of a thread block: as many as the rows take, 4 at most; 5 where that saves a second thread block over the same keys.
inline int decode_row_tiles(const AttentionForwardParams& p, int64_t max_length_q) {
  const int64_t rows = max_length_q * (p.q.heads / p.k.heads);
  return rows <= 16 ? 1 : rows <= 32 ? 2 : rows > 64 && rows <= 80 && p.head_dim <= 64 ? 5 : 4;
}

// Keys that a sequence's queries see between them. Packed: of a sequence of mean length; the device alone knows the lengths.
inline int64_t decode_keys(const AttentionForwardParams& p, int64_t max_length_q) {
  const int64_t keys = p.cu_seqlens_k == nullptr ? p.k.rows : p.k.rows / p.sequences;
  int64_t seen = int64_t{p.mask.upper} - p.mask.lower + max_length_q;
  if (p.mask.chunk > 0) seen = std::min(seen, (int64_t{p.mask.chunk_upper} - p.mask.chunk_lower + 1) * p.mask.chunk + max_length_q);
  return std::min(keys, seen + p.mask.sinks);
}

// Splits that fill `slots` thread blocks best: of those within 5 % of the best filled last wave the fewest.
inline int64_t decode_splits(int64_t tiles, int64_t slots, int64_t most) {
  const auto filled = [&](int64_t splits) {
    const int64_t blocks = tiles * splits, waves = (blocks + slots - 1) / slots;
    return static_cast<double>(blocks) / static_cast<double>(waves * slots);
  };
  most = std::min(most, std::max<int64_t>(1, 4 * slots / tiles));
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, filled(splits));
  for (int64_t splits = 1; splits < most; ++splits) {
    if (filled(splits) >= 0.95 * best) return splits;
  }
  return most;
}

template <class Config>
cudaError_t plan_decode(const AttentionForwardParams& p, int64_t max_length_q, int64_t splits, AttentionDecodePlan* plan) {
  // A split of fewer keys would spend its time on starting.
  constexpr int64_t kLeastKeys = 256;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t group = p.q.heads / p.k.heads;
  const int64_t row_blocks = std::max<int64_t>(1, (max_length_q * group + Config::kRows - 1) / Config::kRows);
  const int64_t tiles = row_blocks * p.k.heads * p.sequences;
  if (splits == 0) splits = decode_splits(tiles, int64_t{multiprocessors} * Config::kBlocksPerSM, decode_keys(p, max_length_q) / kLeastKeys);
  splits = std::clamp<int64_t>(splits, 1, kMaxDecodeSplits);
  if (tiles * splits > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t results = p.q.batch * p.q.rows * p.q.heads * splits;
  plan->row_tiles = Config::kRowTiles;
  plan->row_blocks = static_cast<int32_t>(row_blocks);
  plan->splits = static_cast<int32_t>(splits);
  plan->workspace_bytes = splits == 1 ? 0 : results * (p.head_dim + 1) * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

template <class Config>
cudaError_t launch_decode(const AttentionForwardParams& p, const AttentionDecodePlan& plan, void* workspace, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(DecodeShared<Config>);
  static_assert(Config::kBlocksPerSM * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of a multiprocessor on sm_90: 228 KB, 1 KB a thread block");
  const bool packed = p.cu_seqlens_q != nullptr;
  DecodeMaps maps;
  const auto make = [&](CUtensorMap* map, const AttentionTensor& t) {
    TileSource source = {t.data, t.batch, t.rows, t.heads, p.head_dim, t.batch_stride, t.row_stride, t.head_stride};
    if (source.rows == 0) source = {p.q.data, 1, 1, 1, p.head_dim, 0, 0, 0};  // no keys: never loaded, yet a map is required
    return tma_ready(source) ? make_tile_map(map, source, p.half, packed, Config::kBlockN, CU_TENSOR_MAP_L2_PROMOTION_L2_128B) : cudaErrorInvalidValue;
  };
  cudaError_t status = make(&maps.k, p.k);
  if (status == cudaSuccess) status = make(&maps.v, p.v);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(attention_decode<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;

  DecodeArguments a;
  a.sequences = {p.cu_seqlens_q, p.cu_seqlens_k, p.sequences, static_cast<int>(p.q.rows), static_cast<int>(p.k.rows), p.mask.within(p.q.rows, p.k.rows)};
  a.q = p.q;
  a.out = p.out;
  a.scale = p.scale;
  a.offset = p.offset;
  a.kv_heads = static_cast<int>(p.k.heads);
  a.group = static_cast<int>(p.q.heads / p.k.heads);
  a.head_dim = p.head_dim;
  a.row_blocks = plan.row_blocks;
  a.splits = plan.splits;
  a.scale_log2 = p.softmax_scale * kLog2e;
  a.lse = p.lse;
  a.lse_head_stride = p.q.rows;
  a.lse_sequence_stride = p.q.heads * p.q.rows;
  const int64_t results = p.q.batch * p.q.rows * p.q.heads;
  a.partial_out = plan.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  a.partial_lse = plan.splits > 1 ? a.partial_out + results * plan.splits * p.head_dim : nullptr;

  const auto blocks = static_cast<unsigned>(static_cast<int64_t>(plan.row_blocks) * p.k.heads * plan.splits * p.sequences);
  attention_decode<Config><<<blocks, Config::kThreads, kSharedBytes, stream>>>(maps, a);
  status = cudaGetLastError();
  if (status != cudaSuccess || plan.splits == 1) return status;

  // Launched before the splits have finished (programmatic dependent launch): it waits for them on the device.
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(results));
  config.blockDim = dim3(kCombineThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, attention_decode_combine<typename Config::T, Config::kHeadDim>, a);
}

// The one table of what is launched. Thread blocks a multiprocessor: what shared memory allows.
template <class T, Masking kMasking, class Call>
cudaError_t with_config(int head_dim, int row_tiles, Call call) {
  //                                                                head_dim, keys, stages, row tiles, key warps, blocks an SM
  if (head_dim <= 64) {
    if (row_tiles == 1) return call(DecodeConfig<T, kMasking, 64, 128, 3, 1, 4, 2>{});
    if (row_tiles == 2) return call(DecodeConfig<T, kMasking, 64, 128, 6, 2, 4, 1>{});
    if (row_tiles == 4) return call(DecodeConfig<T, kMasking, 64, 128, 6, 4, 2, 1>{});
    return call(DecodeConfig<T, kMasking, 64, 128, 6, 5, 2, 1>{});
  }
  if (head_dim <= 128) {
    if (row_tiles == 1) return call(DecodeConfig<T, kMasking, 128, 64, 3, 1, 4, 2>{});
    if (row_tiles == 2) return call(DecodeConfig<T, kMasking, 128, 128, 3, 2, 4, 1>{});
    return call(DecodeConfig<T, kMasking, 128, 128, 3, 4, 2, 1>{});
  }
  if (row_tiles == 1) return call(DecodeConfig<T, kMasking, 256, 64, 3, 1, 4, 1>{});
  if (row_tiles == 2) return call(DecodeConfig<T, kMasking, 256, 64, 3, 2, 4, 1>{});
  return call(DecodeConfig<T, kMasking, 256, 64, 3, 4, 2, 1>{});
}

// Calls whose mask kMasking stands for. attention_decode*.cu instantiate it, so that they compile side by side.
template <Masking kMasking>
cudaError_t launch_decode_of(const AttentionForwardParams& p, const AttentionDecodePlan& plan, void* workspace, cudaStream_t stream) {
  const auto launch = [&](auto config) { return launch_decode<decltype(config)>(p, plan, workspace, stream); };
  return p.half ? with_config<__half, kMasking>(p.head_dim, plan.row_tiles, launch)
                : with_config<__nv_bfloat16, kMasking>(p.head_dim, plan.row_tiles, launch);
}

}  // namespace seal::sm90
