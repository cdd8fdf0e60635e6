// What the two sides of the forward kernel share: its configuration, shared memory, arguments and barriers.
#pragma once

#include "../attention.h"
#include "ring.cuh"
#include "tile_scheduler.cuh"
#include "wgmma.cuh"

namespace seal::sm90 {

template <class T_, int kHeadDim_, int kBlockN_, int kWarpgroups_, int kKStages_, int kVStages_, int kQStages_, Masking kMasking_>
struct ForwardConfig {
  using T = T_;
  static constexpr Masking kMasking = kMasking_;
  static constexpr int kHeadDim = kHeadDim_;        // of the shared-memory tiles; the tensors' may be smaller
  static constexpr int kWarpgroups = kWarpgroups_;  // consumers
  static constexpr int kBlockM = 64 * kWarpgroups_, kBlockN = kBlockN_;
  static constexpr int kKStages = kKStages_, kVStages = kVStages_, kQStages = kQStages_;
  // O leaves through the shared memory of Q, or where there is one place for Q only, through that of V.
  static constexpr bool kOutInValues = kQStages == 1;
  // Q as register operand: a third less shared memory traffic of Q K^T. At head_dim 64 and 256 there are no registers for it.
  static constexpr bool kQueriesInRegisters = kHeadDim == 128;
  static constexpr int kThreads = 128 * (kWarpgroups + 1), kConsumerWarps = 4 * kWarpgroups;
  // 65,536 registers: 40 + 2 * 232 or 32 + 3 * 160 for each of 128 lanes of a warpgroup.
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  // A big O is rescaled between the issue of the two products, under the first; a small one right after its own product.
  static constexpr bool kRescaleLate = kHeadDim > 128;
  // What warpgroups and rows see of a general mask is worked out by the warp that picks tiles: the consumers lack the registers.
  static constexpr bool kLimitsInShared = kMasking == Masking::kGeneral && kWarpgroups > 2;
  static constexpr int kQRows = 64;  // Q lies as one tile per warpgroup
  static constexpr int kQBytes = tile_bytes(kQRows, kHeadDim);
  static constexpr int kKBytes = tile_bytes(kBlockN, kHeadDim);
  // Slabs of a tile that hold columns of the tensor: at head_dim up to 128 all of them.
  SEAL_DEVICE static int present_slabs(int head_dim) { return kHeadDim <= 128 ? slabs(kHeadDim) : slabs(head_dim); }
};

// The blocks that a warpgroup's rows see.
template <class Config>
struct Work : KeyTiles<Config::kBlockN, Config::kMasking>::Part {
  // Rows that end in the left half of their last key block compute the scores of that half only.
  static constexpr bool kHalves = Config::kBlockN == 128;
  bool half;  // of block end - 1 only the left half is seen

  static SEAL_DEVICE Work of(const Tile<Config::kBlockN, Config::kMasking>& tile, const Mask& mask, int warpgroup) {
    const int position = tile.row + 64 * warpgroup + tile.length_k - tile.length_q;  // of the first row
    const int last = min(63, tile.length_q - 1 - tile.row - 64 * warpgroup);         // last row, < 0: none
    const HeadMask<Config::kMasking> head_mask(mask, tile.head);
    Work work{tile.blocks.part(head_mask, position, position + last, tile.length_k)};
    work.half = kHalves && work.any() && work.keys_end <= tile.blocks.place(work.end - 1) * Config::kBlockN + Config::kBlockN / 2;
    return work;
  }
};

// The keys that a row sees: those in [begin, end), and those before sink_end.
struct alignas(16) RowLimits {
  int begin, end, sink_end;
};

// Who fills and who empties what. `full` barriers are arrived at by the side that fills, `empty` ones by the side that reads; the other
// side waits. Arrivals are one a warp of consumers (its lane 0), one a producing warp.
//
//   buffer               filled by                  read by                            count of full, empty
//   tile, scale, limits, warp 1                     warp 0 and the consumers           1, kConsumerWarps + 1
//     work [slot]
//   q [stage]            warp 0 (copy engine)       the consumers; at head_dim up to   1 and bytes, kConsumerWarps
//                                                   128 emptied when O has left it
//   k, v [stage]         warp 0 (copy engine)       the consumers, each for each       1 and bytes, kConsumerWarps
//                                                   block, also those it need not see
//
// out_empty: O has left v, through which it goes where Q has one place only. tile_wanted: warp 0 wants the next tile.
template <class Config>
struct Shared {
  uint8_t q[Config::kQStages][Config::kWarpgroups][Config::kQBytes];
  uint8_t k[Config::kKStages][Config::kKBytes];
  uint8_t v[Config::kVStages][Config::kKBytes];
  float scale[2][Config::kHeadDim];
  Tile<Config::kBlockN, Config::kMasking> tile[2];
  uint64_t tile_full[2], tile_empty[2], tile_wanted;
  uint64_t q_full[Config::kQStages], q_empty[Config::kQStages], out_empty;
  uint64_t k_full[Config::kKStages], k_empty[Config::kKStages];
  uint64_t v_full[Config::kVStages], v_empty[Config::kVStages];
  // With kLimitsInShared: what each row and each warpgroup of the tile sees.
  RowLimits limits[2][Config::kLimitsInShared ? Config::kBlockM : 1];
  Work<Config> work[2][Config::kWarpgroups];

  // By one thread.
  SEAL_DEVICE void init_barriers() {
    barriers_init(tile_full, 1);
    barriers_init(tile_empty, Config::kConsumerWarps + 1);
    barrier_init(&tile_wanted, 1);
    barriers_init(q_full, 1);
    barriers_init(q_empty, Config::kConsumerWarps);
    barrier_init(&out_empty, Config::kConsumerWarps);
    barriers_init(k_full, 1);
    barriers_init(k_empty, Config::kConsumerWarps);
    barriers_init(v_full, 1);
    barriers_init(v_empty, Config::kConsumerWarps);
  }
};

struct Maps {
  CUtensorMap q, k, v, out;
};

struct Arguments {
  Sequences sequences;
  int heads, kv_heads, head_dim;
  float scale_log2;
  ChannelTensor scale, offset;
  float* lse;
  int64_t lse_head_stride, lse_sequence_stride;
  int* tile_counter;
  uint32_t zero;  // 0, which ptxas cannot know: see after() in softmax.cuh
};

// Named barriers: 0 is __syncthreads; one per consumer warpgroup for itself, one for its turn to issue.
constexpr int kBarrierWarpgroup = 1, kBarrierTurn = 4;

}  // namespace seal::sm90
