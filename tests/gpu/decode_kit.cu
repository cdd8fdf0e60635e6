// The decode kernels behind a C interface, driven by decode_kit.py through ctypes: any number of splits, and beside the table's
// configurations those of the macro KIT_VARIANTS, a row of V(head_dim, keys, stages, row tiles, key warps, blocks an SM).
#include "cuda/sm90/attention_decode.cu"
#include "cuda/sm90/attention_decode_masked.cu"

namespace {

using namespace seal;

template <class Call>
cudaError_t with_variant(int variant, Call call) {
  int next = 0;
#define V(...) \
  if (variant == next++) return call(sm90::DecodeConfig<__nv_bfloat16, Masking::kBand, __VA_ARGS__>{});
  KIT_VARIANTS
#undef V
  (void)next, (void)call;
  return cudaErrorInvalidValue;
}

// Keys `left` before to `right` after a query's own; -1: no limit on that side.
Mask band(int64_t left, int64_t right) {
  Mask mask;
  if (left >= 0) mask.lower = static_cast<int32_t>(-left);
  if (right >= 0) mask.upper = static_cast<int32_t>(right);
  return mask;
}

AttentionTensor tensor(const void* data, const int64_t* n) { return {data, n[0], n[1], n[2], n[3], n[4], n[5]}; }

}  // namespace

// pointers: q, k, v, out, lse, scale, offset, cu_seqlens_q, cu_seqlens_k, workspace. numbers: six a tensor (batch, rows, heads, their
// strides), three a factor (strides), then sequences, head_dim, window_left, window_right, half, max_length_q, splits, variant (-1: the
// table's), plan_only. plan: row_tiles, row_blocks, splits, workspace_bytes.
extern "C" int kit_decode(void* const* pointers, const int64_t* numbers, float softmax_scale, int64_t* plan_out, void* stream) {
  AttentionForwardParams p = {};
  p.q = tensor(pointers[0], numbers);
  p.k = tensor(pointers[1], numbers + 6);
  p.v = tensor(pointers[2], numbers + 12);
  p.out = tensor(pointers[3], numbers + 18);
  p.lse = static_cast<float*>(pointers[4]);
  p.scale = {static_cast<const float*>(pointers[5]), numbers[24], numbers[25], numbers[26]};
  p.offset = {static_cast<const float*>(pointers[6]), numbers[27], numbers[28], numbers[29]};
  p.cu_seqlens_q = static_cast<const int32_t*>(pointers[7]);
  p.cu_seqlens_k = static_cast<const int32_t*>(pointers[8]);
  const int64_t* n = numbers + 30;
  p.sequences = static_cast<int32_t>(n[0]);
  p.head_dim = static_cast<int32_t>(n[1]);
  p.mask = band(n[2], n[3]);
  p.half = n[4] != 0;
  p.softmax_scale = softmax_scale;
  const int64_t max_length_q = n[5];
  const int splits = static_cast<int>(n[6]), variant = static_cast<int>(n[7]);
  AttentionDecodePlan plan;
  cudaError_t status = variant < 0 ? plan_attention_decode(p, max_length_q, splits, &plan)
                                   : with_variant(variant, [&](auto c) { return sm90::plan_decode<decltype(c)>(p, max_length_q, splits, &plan); });
  if (status != cudaSuccess) return status;
  plan_out[0] = plan.row_tiles;
  plan_out[1] = plan.row_blocks;
  plan_out[2] = plan.splits;
  plan_out[3] = plan.workspace_bytes;
  if (n[8] != 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  return variant < 0 ? launch_attention_decode(p, plan, pointers[9], s)
                     : with_variant(variant, [&](auto c) { return sm90::launch_decode<decltype(c)>(p, plan, pointers[9], s); });
}

// Whether the op would take these kernels for the call: n as above.
extern "C" int kit_prefers(int64_t sequences, int64_t heads, int64_t kv_heads, int64_t keys, int64_t window_left, int64_t window_right,
                           int64_t max_length_q) {
  AttentionForwardParams p = {};
  p.q.heads = heads;
  p.k.heads = kv_heads;
  p.k.rows = keys;
  p.sequences = static_cast<int32_t>(sequences);
  p.mask = band(window_left, window_right);
  return prefers_attention_decode(p, max_length_q);
}
