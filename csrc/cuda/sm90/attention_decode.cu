// Attention forward for few queries: which kernel, how many splits, and the launches. The kernels: decode_kernel.cuh, decode_combine.cuh.
#include "../attention_decode.h"

#include "decode_launch.cuh"

namespace seal::sm90 {
namespace {

// The one table of what is launched. Thread blocks a multiprocessor: what shared memory allows.
template <class T, class Call>
cudaError_t with_config(int head_dim, int row_tiles, Call call) {
  //                                                      head_dim, keys, stages, row tiles, key warps, blocks an SM
  if (head_dim <= 64) {
    if (row_tiles == 1) return call(DecodeConfig<T, 64, 128, 3, 1, 4, 2>{});
    if (row_tiles == 2) return call(DecodeConfig<T, 64, 128, 6, 2, 4, 1>{});
    if (row_tiles == 4) return call(DecodeConfig<T, 64, 128, 6, 4, 2, 1>{});
    return call(DecodeConfig<T, 64, 128, 6, 5, 2, 1>{});
  }
  if (head_dim <= 128) {
    if (row_tiles == 1) return call(DecodeConfig<T, 128, 64, 3, 1, 4, 2>{});
    if (row_tiles == 2) return call(DecodeConfig<T, 128, 128, 3, 2, 4, 1>{});
    return call(DecodeConfig<T, 128, 128, 3, 4, 2, 1>{});
  }
  if (row_tiles == 1) return call(DecodeConfig<T, 256, 64, 3, 1, 4, 1>{});
  if (row_tiles == 2) return call(DecodeConfig<T, 256, 64, 3, 2, 4, 1>{});
  return call(DecodeConfig<T, 256, 64, 3, 4, 2, 1>{});
}

}  // namespace
}  // namespace seal::sm90

namespace seal {

bool prefers_attention_decode(const AttentionForwardParams& p, int64_t max_length_q) {
  // With one head a KV head and enough of them the ordinary kernel reads every key once and keeps the GPU as busy.
  if (!p.mask.is_band()) return false;
  const int64_t group = p.q.heads / p.k.heads;
  const bool few = max_length_q <= 8 || (max_length_q * group <= 64 && (group > 1 || p.sequences * p.q.heads < 128));
  return few && 4 * max_length_q <= sm90::decode_keys(p, max_length_q);
}

cudaError_t plan_attention_decode(const AttentionForwardParams& p, int64_t max_length_q, int32_t splits, AttentionDecodePlan* plan) {
  const int row_tiles = sm90::decode_row_tiles(p, max_length_q);
  return sm90::with_config<__nv_bfloat16>(p.head_dim, row_tiles, [&](auto config) {
    return sm90::plan_decode<decltype(config)>(p, max_length_q, splits, plan);
  });
}

cudaError_t launch_attention_decode(const AttentionForwardParams& p, const AttentionDecodePlan& plan, void* workspace, cudaStream_t stream) {
  if (p.head_dim > 256 || p.head_dim % 8 != 0 || !p.mask.is_band()) return cudaErrorInvalidValue;
  const auto launch = [&](auto config) { return sm90::launch_decode<decltype(config)>(p, plan, workspace, stream); };
  return p.half ? sm90::with_config<__half>(p.head_dim, plan.row_tiles, launch)
                : sm90::with_config<__nv_bfloat16>(p.head_dim, plan.row_tiles, launch);
}

}  // namespace seal
