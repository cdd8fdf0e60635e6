// What a thread block of the backward works on: a tile of keys of a key/value head, or a tile of queries of a head, and the tiles
// of the other side that it sees.
#pragma once

#include "backward_common.cuh"
#include "mask.cuh"

namespace seal::sm90 {

// A tile of kRows keys and the query tiles of kColumns rows that see it, for some query heads of the group. It lies in shared
// memory: in registers it would cost what the accumulators need.
template <int kColumns, int kRows, Masking kMasking>
struct BackwardTask : QueryTiles<kColumns, kMasking> {
  using Seen = QueryTiles<kColumns, kMasking>;

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
    Seen seen{};
    if (first_key < seq.length_k) seen.find(mask_of_head(p), first_key, min(first_key + kRows, seq.length_k) - 1, seq.length_q, seq.length_k);
    if (first_key + kRows > seq.length_k) seen.whole_end = seen.whole_begin;  // keys past the end are masked
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

  // All query heads of a key/value head have one.
  SEAL_DEVICE HeadMask<kMasking> mask_of_head(const BackwardKernelParams& p) const { return {p.mask, first_head}; }

  // The first tile of queries that sees a key from the tile's `key`th on.
  SEAL_DEVICE int first_seen_by(const BackwardKernelParams& p, int key) const {
    if (first_key + key >= seq.length_k) return INT32_MAX;
    Seen seen;
    seen.find(mask_of_head(p), first_key + key, seq.length_k - 1, seq.length_q, seq.length_k);
    return seen.begin;
  }
  // Masks the scores of tile `tile`; `row` is the thread's first row of the accumulator, counted as the tile's keys.
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int tile, int row) const {
    const HeadMask<kMasking> head_mask = mask_of_head(p);
    const int first_position = tile * kColumns + threadIdx.x % 4 * 2 + seq.shift();  // of the thread's first column
    Span seen[2];
    int sink_begin[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + row + 8 * h;
      const Span positions = head_mask.positions(key);
      const bool present = key < seq.length_k;
      seen[h] = {present ? positions.begin - first_position : INT32_MAX, positions.end - first_position};
      sink_begin[h] = present && head_mask.is_sink(key) ? key - first_position : INT32_MAX;
    }
    mask_transposed<kMasking == Masking::kGeneral>(scores, seen, sink_begin);
  }
};

// A tile of kTileRows queries and the key tiles of kColumns keys that they see.
template <int kColumns, Masking kMasking>
struct QueryTask : KeyTiles<kColumns, kMasking> {
  int whole_begin, whole_end;  // tiles in which nothing is masked
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
    const HeadMask<kMasking> head_mask(p.mask, head);
    const int first = first_query + seq.shift(), last = min(first_query + kTileRows, seq.length_q) - 1 + seq.shift();
    this->find(head_mask, first, last, seq.length_k);
    const auto all = this->part(head_mask, first, last, seq.length_k);
    whole_begin = all.whole_begin;
    whole_end = all.whole_end;
  }
  // Masks the scores of the tile of that number; `row` is the thread's first row of the accumulator, counted as the tile's queries.
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int number, int row) const {
    const HeadMask<kMasking> head_mask(p.mask, head);
    const int first_column = this->place(number) * kColumns + threadIdx.x % 4 * 2;
    Span seen[2];
    int sink_end[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = first_query + row + 8 * h + seq.shift();
      const Span keys = head_mask.keys(position, seq.length_k);
      seen[h] = {keys.begin - first_column, keys.end - first_column};
      sink_end[h] = head_mask.sink_end(position, seq.length_k) - first_column;
    }
    mask_scores<kMasking == Masking::kGeneral>(scores, seen, sink_end);
  }
};

}  // namespace seal::sm90
