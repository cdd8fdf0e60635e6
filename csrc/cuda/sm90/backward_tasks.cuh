// What a thread block of the backward works on: a tile of keys of a key/value head, or a tile of queries of a head, and the tiles
// of the other side that it sees.
#pragma once

#include "backward_common.cuh"
#include "mask.cuh"

namespace seal::sm90 {

SEAL_DEVICE Band band_of_queries(const BackwardKernelParams& p, const Sequence& s) {
  return {s.shift(), p.window_left, p.window_right, s.length_q, s.length_k};
}
SEAL_DEVICE Band band_of_keys(const BackwardKernelParams& p, const Sequence& s) {
  return {-s.shift(), p.window_right, p.window_left, s.length_k, s.length_q};
}

// A tile of kRows keys and the query tiles of kColumns rows that see it, for some query heads of the group. It lies in shared
// memory: in registers it would cost what the accumulators need.
template <int kColumns, int kRows = kTileRows>
struct BackwardTask : SeenTiles<Side::kKeys, kRows, kColumns> {
  using Seen = SeenTiles<Side::kKeys, kRows, kColumns>;

  Sequence seq;
  bool any;                  // else the launch has no task left
  int batch_row, head_k, split, first_key;
  int first_head;
  uint64_t exact;            // bit h: head first_head + h needs an exact dscale
  int64_t tile;              // among all tiles of keys

  // The task in place `block` of the launch order. All lanes of a converged warp call it, those with `writes` write: all of them
  // where the task is a variable of each, one where it lies in shared memory.
  SEAL_DEVICE void find(const BackwardKernelParams& p, int block, bool writes) {
    const bool packed = p.cu_seqlens_k != nullptr;
    const LaunchOrder order(block, p.tiles_k, (packed ? 1 : p.batch) * p.heads_k * p.splits, p.section, p.last_section);
    if (writes) {
      split = order.pair % p.splits;
      head_k = order.pair / p.splits % p.heads_k;
      batch_row = order.pair / p.splits / p.heads_k;
      first_head = (head_k * p.splits + split) * p.heads_per_cta;
      exact = 0;
      tile = packed ? order.tile : static_cast<int64_t>(batch_row) * p.tiles_k + order.tile;
    }
    __syncwarp();
    int local;
    const Sequence found = locate(p, p.cu_seqlens_k, kRows, order.tile, batch_row, &local);
    if (writes) {
      seq = found;
      first_key = local * kRows;
    }
    __syncwarp();
    Seen seen;
    seen.find(band_of_keys(p, seq), first_key);
    if (writes) static_cast<Seen&>(*this) = seen;
  }
  // All lanes of a converged warp call it.
  SEAL_DEVICE void find_exact_heads(const BackwardKernelParams& p, bool writes) {
    if (p.dscale_exact == nullptr) return;
#pragma unroll 1
    for (int h = 0; h < p.heads_per_cta; ++h) {
      if (needs_exact_dscale(p, seq.index, first_head + h) && writes) exact |= uint64_t{1} << h;
    }
  }
  SEAL_DEVICE int first_exact_head() const { return next_exact_head(first_head - 1); }
  // The exact head after `head`, if there is one.
  SEAL_DEVICE int next_exact_head(int head) const { return head + __ffsll(exact >> (head + 1 - first_head)); }
  SEAL_DEVICE int exact_steps() const { return (this->end - this->begin) * __popcll(exact); }

  // The first tile of queries that sees a key from the tile's `key`th on.
  SEAL_DEVICE int first_seen_by(const BackwardKernelParams& p, int key) const {
    if (first_key + key >= seq.length_k) return INT32_MAX;
    return columns_seen(band_of_keys(p, seq), first_key + key).begin / kColumns;
  }
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int query_tile, int key) const {
    mask_tile<Side::kKeys>(band_of_keys(p, seq), scores, query_tile * kColumns, key);
  }
};

// A tile of kTileRows queries and the key tiles of kColumns keys that they see.
template <int kColumns>
struct QueryTask : SeenTiles<Side::kQueries, kTileRows, kColumns> {
  using Seen = SeenTiles<Side::kQueries, kTileRows, kColumns>;

  Sequence seq;
  int batch_row, head, first_query;

  SEAL_DEVICE QueryTask(const BackwardKernelParams& p) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const int pair = blockIdx.x / p.tiles_q;
    batch_row = packed ? 0 : pair / p.heads_q;
    head = pair % p.heads_q;
    int local;
    seq = locate(p, p.cu_seqlens_q, kTileRows, p.tiles_q - 1 - static_cast<int>(blockIdx.x) % p.tiles_q, batch_row, &local);  // the longest first
    first_query = local * kTileRows;
    Seen::find(band_of_queries(p, seq), first_query);
  }
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int key_tile, int query) const {
    mask_tile<Side::kQueries>(band_of_queries(p, seq), scores, key_tile * kColumns, query);
  }
};

}  // namespace seal::sm90
