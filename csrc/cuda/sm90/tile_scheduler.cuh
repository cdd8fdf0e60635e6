// Which tile of the output a thread block computes next, and which keys that tile sees.
#pragma once

#include "../mask.h"
#include "ptx.cuh"

namespace seal::sm90 {

// Lengths and mask of a problem, as the kernels carry them.
struct Sequences {
  const int32_t* cu_seqlens_q;  // null: dense, every sequence has length_q queries and length_k keys
  const int32_t* cu_seqlens_k;
  int count;
  int length_q, length_k;
  Mask mask;

  SEAL_DEVICE bool packed() const { return cu_seqlens_q != nullptr; }
};

// One tile of queries of one head of one sequence.
template <int kBlockN, Masking kMasking>
struct Tile {
  int row;            // first query of the tile, counted from the sequence's start; -1: no tile left
  int head, kv_head;
  int sequence;
  int length_q, length_k;
  int first_q, first_k;      // what RowCoordinates calls `first`
  KeyTiles<kBlockN, kMasking> blocks;  // of keys that some row of the tile sees
};

// Hands out tiles in an order that keeps the end of a launch short and the keys in the L2 cache: sequence by sequence; inside
// a sequence by sections of heads whose K and V fit in kSectionBytes; inside a section the tiles with the most causal work
// first. Used by one whole warp; every lane gets the same tile.
template <int kBlockM, int kBlockN, Masking kMasking>
class TileScheduler {
 public:
  using Tile = sm90::Tile<kBlockN, kMasking>;
  static constexpr int64_t kSectionBytes = 16 << 20;

  // counter: tiles beyond the first gridDim.x are claimed through it; null: tile t goes to thread block t % gridDim.x.
  SEAL_DEVICE TileScheduler(const Sequences& sequences, int heads, int kv_heads, int head_dim, int* counter)
      : sequences_(sequences), heads_(heads), kv_heads_(kv_heads), group_(heads / kv_heads), counter_(counter), index_(blockIdx.x) {
    section_keys_ = static_cast<int>(kSectionBytes / (4 * head_dim));
  }

  // Moves on to the next tile. Call it as late as the next tile can wait: tiles claimed early are worked on out of order.
  SEAL_DEVICE void claim() {
    if (counter_ == nullptr) {
      index_ += gridDim.x;
    } else {
      int claimed = 0;
      if (threadIdx.x % 32 == 0) claimed = atomicAdd(counter_, 1);
      index_ = __shfl_sync(0xffffffffu, claimed, 0) + gridDim.x;
    }
  }

  // The tile claimed last, or the thread block's first.
  SEAL_DEVICE Tile tile() {
    Tile tile;
    tile.row = -1;
    const int lane = threadIdx.x % 32;
    int blocks, local;  // query blocks of the sequence; this tile's index among the tiles of the sequence
    if (sequences_.packed()) {
      // Step through 32 sequences at a time; indices only grow, so the search resumes where it stopped.
      while (true) {
        if (first_sequence_ >= sequences_.count) return tile;
        const int s = first_sequence_ + lane;
        const int length = s < sequences_.count ? sequences_.cu_seqlens_q[s + 1] - sequences_.cu_seqlens_q[s] : 0;
        const int mine = (length + kBlockM - 1) / kBlockM;
        int total = mine;  // inclusive prefix sum over the lanes
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int left = __shfl_up_sync(0xffffffffu, total, offset);
          if (lane >= offset) total += left;
        }
        const unsigned beyond = __ballot_sync(0xffffffffu, (index_ - first_index_) / heads_ < total);
        if (beyond != 0) {
          const int winner = __ffs(beyond) - 1;
          blocks = __shfl_sync(0xffffffffu, mine, winner);
          local = index_ - first_index_ - (__shfl_sync(0xffffffffu, total, winner) - blocks) * heads_;
          tile.sequence = first_sequence_ + winner;
          break;
        }
        first_index_ += __shfl_sync(0xffffffffu, total, 31) * heads_;
        first_sequence_ += 32;
      }
      tile.first_q = sequences_.cu_seqlens_q[tile.sequence];
      tile.first_k = sequences_.cu_seqlens_k[tile.sequence];
      tile.length_q = sequences_.cu_seqlens_q[tile.sequence + 1] - tile.first_q;
      tile.length_k = sequences_.cu_seqlens_k[tile.sequence + 1] - tile.first_k;
    } else {
      blocks = (sequences_.length_q + kBlockM - 1) / kBlockM;
      tile.sequence = index_ / (blocks * heads_);
      if (tile.sequence >= sequences_.count) return tile;
      local = index_ - tile.sequence * blocks * heads_;
      tile.first_q = tile.first_k = tile.sequence;
      tile.length_q = sequences_.length_q;
      tile.length_k = sequences_.length_k;
    }
    const int section_heads = min(kv_heads_, max(1, section_keys_ / max(tile.length_k, 1))) * group_;
    const int section = local / (section_heads * blocks);
    local -= section * section_heads * blocks;
    const int heads_here = min(section_heads, heads_ - section * section_heads);
    tile.head = section * section_heads + local % heads_here;
    tile.kv_head = tile.head / group_;
    tile.row = (blocks - 1 - local / heads_here) * kBlockM;
    const int shift = tile.length_k - tile.length_q;
    const int last_row = min(tile.row + kBlockM, tile.length_q) - 1;
    tile.blocks.find(HeadMask<kMasking>(sequences_.mask, tile.head), tile.row + shift, last_row + shift, tile.length_k);
    return tile;
  }

 private:
  const Sequences& sequences_;
  int heads_, kv_heads_, group_, section_keys_;
  int* counter_;
  int index_;
  int first_sequence_ = 0, first_index_ = 0;
};

}  // namespace seal::sm90
