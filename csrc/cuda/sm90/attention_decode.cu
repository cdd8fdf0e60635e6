// Attention forward for few queries: which kernel, how many splits, and the launches. The kernels: decode_kernel.cuh, decode_combine.cuh.
#include "../attention_decode.h"

#include "decode_launch.cuh"

namespace seal {

namespace sm90 {
extern template cudaError_t launch_decode_of<Masking::kGeneral>(const AttentionForwardParams&, const AttentionDecodePlan&, void*, cudaStream_t);
}

bool prefers_attention_decode(const AttentionForwardParams& p, int64_t max_length_q) {
  // With one head a KV head and enough of them the ordinary kernel reads every key once and keeps the GPU as busy.
  const int64_t group = p.q.heads / p.k.heads;
  const bool few = max_length_q <= 8 || (max_length_q * group <= 64 && (group > 1 || p.sequences * p.q.heads < 128));
  return few && 4 * max_length_q <= sm90::decode_keys(p, max_length_q);
}

cudaError_t plan_attention_decode(const AttentionForwardParams& p, int64_t max_length_q, int32_t splits, AttentionDecodePlan* plan) {
  const int row_tiles = sm90::decode_row_tiles(p, max_length_q);
  return sm90::with_config<__nv_bfloat16, Masking::kBand>(p.head_dim, row_tiles, [&](auto config) {
    return sm90::plan_decode<decltype(config)>(p, max_length_q, splits, plan);
  });
}

cudaError_t launch_attention_decode(const AttentionForwardParams& p, const AttentionDecodePlan& plan, void* workspace, cudaStream_t stream) {
  if (p.head_dim > 256 || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return p.mask.is_band() ? sm90::launch_decode_of<Masking::kBand>(p, plan, workspace, stream)
                          : sm90::launch_decode_of<Masking::kGeneral>(p, plan, workspace, stream);
}

}  // namespace seal
