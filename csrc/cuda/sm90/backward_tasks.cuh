// What a thread block of the backward works on: a tile of keys of a key/value head, or a tile of queries of a head, and the tiles
// of the other side that it sees.
#pragma once

#include "attention_backward_common.cuh"

namespace seal::sm90 {

// Named barriers; 0 is __syncthreads.
constexpr uint32_t kBarrierConsumers = 1;  // both consumer warpgroups
constexpr uint32_t kBarrierValues = 2;     // the one that makes dV (attention_backward_wide.cuh)

// The mask between the rows of a tile, queries or keys, and the columns of its score tiles, the other side: row r sees columns
// r + offset - before .. r + offset + after; -1: no limit on that side.
struct Band {
  int offset, before, after;
  int rows, columns;  // of the sequence

  static SEAL_DEVICE Band of_queries(const BackwardKernelParams& p, const Sequence& s) {
    return {s.shift(), p.window_left, p.window_right, s.length_q, s.length_k};
  }
  static SEAL_DEVICE Band of_keys(const BackwardKernelParams& p, const Sequence& s) {
    return {-s.shift(), p.window_right, p.window_left, s.length_k, s.length_q};
  }
};

enum class Side { kQueries, kKeys };

// The tiles of kColumns columns that a tile of kRows rows of side kOf sees. Queries past the end of their sequence need no mask:
// their log-sum-exp is infinite. Keys past the end do.
template <Side kOf, int kRows, int kColumns>
struct SeenTiles {
  int begin, end;
  int full_begin, full_end;  // those of them in which nothing is masked

  SEAL_DEVICE void find(const Band& band, int first_row) {
    const int last_row = min(first_row + kRows, band.rows) - 1;
    const int first = band.before < 0 ? 0 : max(0, first_row + band.offset - band.before);
    const int last = band.after < 0 ? band.columns - 1 : min(band.columns - 1, last_row + band.offset + band.after);
    begin = first / kColumns;
    end = last_row < first_row || last < first ? begin : last / kColumns + 1;
    // Every row sees the columns from last_row + offset - before to first_row + offset + after.
    full_begin = band.before < 0 ? begin : (max(0, last_row + band.offset - band.before) + kColumns - 1) / kColumns;
    const int seen_by_all = max(0, first_row + band.offset + band.after + 1);
    if constexpr (kOf == Side::kQueries) {
      full_end = (band.after < 0 ? band.columns : min(band.columns, seen_by_all)) / kColumns;
    } else {
      full_end = band.after < 0 ? end : seen_by_all / kColumns;
      if (first_row + kRows > band.rows) full_end = full_begin;
    }
  }

  // Sets the scores of tile `tile` to -inf where masked; `row` is the thread's first row of the accumulator.
  static SEAL_DEVICE void mask(const Band& band, float (&scores)[kColumns / 2], int tile, int row) {
    const int first_column = tile * kColumns + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int center = row + 8 * h + band.offset;
      int low = band.before < 0 ? INT32_MIN : center - band.before;
      int high = band.after < 0 ? INT32_MAX : center + band.after;
      if constexpr (kOf == Side::kQueries) {
        high = min(high, band.columns - 1);
      } else {
        if (row + 8 * h >= band.rows) low = INT32_MAX;
      }
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = first_column + 8 * j + c;
          if (column < low || column > high) scores[4 * j + 2 * h + c] = -INFINITY;
        }
      }
    }
  }
};

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
    seen.find(Band::of_keys(p, seq), first_key);
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

  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int m, int key) const {
    Seen::mask(Band::of_keys(p, seq), scores, m, key);
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
    batch_row = packed ? 0 : pair / p.heads_q, head = pair % p.heads_q;
    int local;
    seq = locate(p, p.cu_seqlens_q, kTileRows, p.tiles_q - 1 - static_cast<int>(blockIdx.x) % p.tiles_q, batch_row, &local);  // the longest first
    first_query = local * kTileRows;
    Seen::find(Band::of_queries(p, seq), first_query);
  }
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kColumns / 2], int n, int query) const {
    Seen::mask(Band::of_queries(p, seq), scores, n, query);
  }
};

}  // namespace seal::sm90
