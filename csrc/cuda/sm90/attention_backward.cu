// Plan and launches of the attention backward on sm_90a: which kernels run, on which workspace.
#include <algorithm>

#include "backward_common.cuh"

namespace seal {

using namespace sm90;

namespace {

// Deterministic mode up to head_dim 128: the main kernel adds dQ up in the order of the keys, in five products. False: dQ comes from
// the query kernel, in two products more.
constexpr bool kOrderedAdds = true;
constexpr int kOrderedShare = 4;

// The workspace, part by part, each 256-byte aligned.
struct Arena {
  char* base;
  size_t used = 0;
  float* floats(int64_t count) {
    float* const at = base == nullptr ? nullptr : reinterpret_cast<float*>(base + used);
    used += (static_cast<size_t>(count) * 4 + 255) / 256 * 256;
    return at;
  }
};

int device_multiprocessors() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 132;
}

// Whether sixteen bytes of the tables of cos and sin at a time belong to eight (fp32: four) channels that turn in their order.
bool reads_by_vectors(const AttentionBackwardParams& p) {
  if (p.cos == nullptr || p.interleaved || p.rotary_dim % 16 != 0) return false;
  const int64_t vector = p.cos_type == 2 ? 4 : 8;
  for (const int64_t stride : {p.cos_batch_stride, p.cos_row_stride, p.sin_batch_stride, p.sin_row_stride}) {
    if (stride % vector != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(p.cos) % 16 == 0 && reinterpret_cast<uintptr_t>(p.sin) % 16 == 0;
}

// Fills in everything that follows from the caller's struct; returns the bytes of workspace.
size_t plan(const AttentionBackwardParams& params, BackwardKernelParams* p) {
  static_cast<AttentionBackwardParams&>(*p) = params;
  p->mask = params.mask.within(params.seqlen_q, params.seqlen_k);
  const bool packed = p->cu_seqlens_q != nullptr;
  const int dim = padded_head_dim(p->head_dim);
  p->key_rows = key_rows(dim);
  const auto tiles = [&](int64_t length, int rows) { return static_cast<int32_t>(packed ? length / rows + p->batch : (length + rows - 1) / rows); };
  p->tiles_q = tiles(p->seqlen_q, kTileRows);
  p->tiles_k = tiles(p->seqlen_k, p->key_rows);
  p->tile_count_q = static_cast<int64_t>(p->tiles_q) * (packed ? 1 : p->batch);
  p->tile_count_k = static_cast<int64_t>(p->tiles_k) * (packed ? 1 : p->batch);
  p->padded_rows_q = p->tile_count_q * kTileRows;

  // A thread block that walks through several query heads of a group adds up their dK and dV in registers; what is split leaves as fp32
  // partial sums, 16 bytes an element written and read. So as many heads to a thread block as leave enough thread blocks: almost two rounds of
  // them, which the causal tiles, the longest first, fill as well as four (docs/kernel_notes_backward.md).
  const int group = p->heads_q / p->heads_k;
  constexpr int kMostHeads = 32;  // of a thread block (BackwardTask::exact)
  if (p->multiprocessors <= 0) p->multiprocessors = device_multiprocessors();
  if (p->enough_ctas <= 0) p->enough_ctas = 2 * p->multiprocessors - 8;
  const int64_t key_tiles = p->tile_count_k * p->heads_k;
  // And where several pairs are at work at a time, only heads whose rows stay in L2 together: tiles of unlike length are then at
  // unlike heads.
  constexpr int64_t kL2Share = 40 << 20;
  const int64_t head_bytes = static_cast<int64_t>(p->seqlen_q) * dim * 8;
  const bool several_pairs = !packed && dim < 256 && p->tiles_k < p->multiprocessors;
  p->heads_per_cta = 1;
  for (int heads = 2; heads <= std::min(group, kMostHeads); ++heads) {
    if (several_pairs && heads * head_bytes > kL2Share) break;
    if (group % heads == 0 && key_tiles * (group / heads) >= p->enough_ctas) p->heads_per_cta = heads;
  }
  p->splits = group / p->heads_per_cta;

  // Sections as wide as the rows of their heads stay in L2, and as fill the multiprocessors: of a narrower one the longest
  // tiles start while another section is at work all the same, and at the end of the launch too late. Not wider than all
  // pairs: the kernels multiply by tiles_k in 32 bits.
  const int64_t pairs = std::max<int64_t>(1, static_cast<int64_t>(packed ? 1 : p->batch) * p->heads_k * p->splits);
  const int64_t pair_bytes = std::max<int64_t>(1, head_bytes * p->heads_per_cta);
  const int64_t filling = p->multiprocessors / std::max(1, p->tiles_k);
  // In the order of the keys, few tiles of a pair should be at work at a time: each adds its dQ behind the ones before it. Dense:
  // so many pairs that a kOrderedShare-th of a pair's tiles fills the multiprocessors. Where the tiles of keys that see a query
  // have gaps between them there is no such order yet.
  const bool ordered = kOrderedAdds && p->mask.is_band() && p->deterministic && p->grad_q && (p->grad_k || p->grad_v) && dim < 256;
  // Tiles of sinks are seen by all later queries, a hundred times as many as others in a long sequence: all of them start first.
  const int64_t least = p->mask.sinks > 0 ? pairs
                        : !ordered        ? 1
                        : packed          ? p->multiprocessors / 16
                                          : p->multiprocessors * kOrderedShare / std::max(1, p->tiles_k);
  p->section = packed && !ordered ? 1 : static_cast<int32_t>(std::min(pairs, std::max({kL2Share / pair_bytes, filling, least, int64_t{1}})));
  p->last_section = static_cast<int32_t>((pairs / p->section - 1) * p->section);  // with what is left over

  p->turn_by_vectors = reads_by_vectors(*p);

  const bool need_products = p->grad_q || p->grad_k || p->grad_v, need_keys = p->grad_k || p->grad_v;
  const bool need_rows = need_products || p->grad_scale;
  const int64_t kv_floats = static_cast<int64_t>(p->heads_k) * p->tile_count_k * p->key_rows * dim;
  Arena arena{static_cast<char*>(p->workspace)};
  p->task_count = static_cast<int32_t>(p->tile_count_k * p->heads_k * p->splits);
  p->task_counter = reinterpret_cast<int32_t*>(arena.floats(1));
  p->lse2 = need_rows ? arena.floats(p->heads_q * p->padded_rows_q) : nullptr;
  p->delta = need_rows ? arena.floats(p->heads_q * p->padded_rows_q) : nullptr;
  p->dq = p->grad_q && need_keys && (!p->deterministic || ordered) && dim < 256 ? arena.floats(p->heads_q * p->padded_rows_q * dim) : nullptr;
  p->added = ordered ? reinterpret_cast<int32_t*>(arena.floats(p->heads_q * p->padded_rows_q / step_rows(dim) * 2)) : nullptr;
  p->dk_partial = p->splits > 1 && p->grad_k ? arena.floats(p->splits * kv_floats) : nullptr;
  p->dv_partial = p->splits > 1 && p->grad_v ? arena.floats(p->splits * kv_floats) : nullptr;
  const int64_t tokens_q = static_cast<int64_t>(p->seqlen_q) * (packed ? 1 : p->batch);
  p->scaled_grad = p->scale && need_products ? arena.floats((tokens_q * p->heads_q * p->head_dim + 1) / 2) : nullptr;
  p->dscale_partial = p->grad_scale ? arena.floats(p->tile_count_q * p->heads_q * dim) : nullptr;
  p->dscale_exact = p->grad_scale ? arena.floats(p->tile_count_k * p->heads_q * dim) : nullptr;
  p->doffset_partial = p->grad_offset ? arena.floats(p->tile_count_q * p->heads_q * dim) : nullptr;
  return arena.used;
}

}  // namespace

size_t attention_backward_workspace(const AttentionBackwardParams& params) {
  BackwardKernelParams p;
  return plan(params, &p);
}

cudaError_t launch_attention_backward(const AttentionBackwardParams& params, cudaStream_t stream) {
  BackwardKernelParams p;
  plan(params, &p);
  if (std::max(p.tile_count_q, p.tile_count_k) * p.heads_q > INT32_MAX) return cudaErrorInvalidValue;  // no grid is larger
  switch (padded_head_dim(p.head_dim)) {
    case 64: return p.half ? launch_backward<__half, 64>(p, stream) : launch_backward<__nv_bfloat16, 64>(p, stream);
    case 128: return p.half ? launch_backward<__half, 128>(p, stream) : launch_backward<__nv_bfloat16, 128>(p, stream);
    default: return p.half ? launch_backward<__half, 256>(p, stream) : launch_backward<__nv_bfloat16, 256>(p, stream);
  }
}

}  // namespace seal
