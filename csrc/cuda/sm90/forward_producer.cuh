// The producing side of the forward kernel: one warp that picks tiles, one that runs the copy engine.
#pragma once

#include "forward_common.cuh"

namespace seal::sm90 {

template <class Config>
SEAL_DEVICE void produce_tiles(Shared<Config>& shared, const Arguments& arguments) {
  const int lane = threadIdx.x % 32;
  TileScheduler<Config::kBlockM, Config::kBlockN, Config::kMasking> scheduler(arguments.sequences, arguments.heads, arguments.kv_heads,
                                                                              arguments.head_dim, arguments.tile_counter);
  RingIndex<2> slot;
  RingIndex<1> wanted;
  while (true) {
    const auto tile = scheduler.tile();
    barrier_wait(&shared.tile_empty[slot.stage], slot.phase ^ 1);
    if (tile.row >= 0) {
      const ChannelTensor& scale = arguments.scale;
      const float* row = scale.data + tile.sequence * scale.batch_stride + tile.head * scale.head_stride;
#pragma unroll 1
      for (int channel = lane; channel < Config::kHeadDim; channel += 32) {
        const bool present = scale.data != nullptr && channel < arguments.head_dim;
        shared.scale[slot.stage][channel] = present ? row[channel * scale.channel_stride] : 1.f;
      }
    }
    if constexpr (Config::kLimitsInShared) {
      if (tile.row >= 0 && lane < Config::kWarpgroups) shared.work[slot.stage][lane] = Work<Config>::of(tile, arguments.sequences.mask, lane);
      const HeadMask<Config::kMasking> head_mask(arguments.sequences.mask, tile.head);
      const int first_position = tile.row + tile.length_k - tile.length_q;
#pragma unroll 1
      for (int row = lane; tile.row >= 0 && row < Config::kBlockM; row += 32) {
        const Span keys = head_mask.keys(first_position + row, tile.length_k);
        shared.limits[slot.stage][row] = {keys.begin, keys.end, head_mask.sink_end(first_position + row, tile.length_k)};
      }
    }
    if (lane == 0) shared.tile[slot.stage] = tile;
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.tile_full[slot.stage]);
    if (tile.row < 0) return;
    slot.advance();
    barrier_wait(&shared.tile_wanted, wanted.phase);
    wanted.advance();
    scheduler.claim();
  }
}

template <class Config>
SEAL_DEVICE void produce_operands(Shared<Config>& shared, const Maps& maps, const Arguments& arguments) {
  const bool packed = arguments.sequences.packed();
  const int present = Config::present_slabs(arguments.head_dim);
  const uint64_t keep = policy_evict_last(), once = policy_evict_first();
  RingIndex<2> slot;
  RingIndex<Config::kQStages> q;
  RingIndex<Config::kKStages> k;
  RingIndex<Config::kVStages> v;
  RingIndex<1> out;
  while (true) {
    barrier_wait(&shared.tile_full[slot.stage], slot.phase);
    const auto tile = shared.tile[slot.stage];
    barrier_arrive(&shared.tile_empty[slot.stage]);
    slot.advance();
    if (tile.row < 0) return;

    const auto load = [&](void* to, const CUtensorMap* map, uint64_t* full, uint64_t* empty, uint32_t phase, int block) {
      barrier_wait(empty, phase ^ 1);
      barrier_expect_bytes(full, present * Config::kBlockN * kSlabRowBytes);
      const RowCoordinates at(packed, Config::kBlockN, tile.blocks.place(block) * Config::kBlockN, tile.length_k, tile.first_k);
      tma_load_tile<Config::kBlockN, Config::kHeadDim>(to, map, full, tile.kv_head, at, keep, present);
    };
    const auto load_k = [&](int block) {
      load(shared.k[k.stage], &maps.k, &shared.k_full[k.stage], &shared.k_empty[k.stage], k.phase, block);
      k.advance();
    };
    const auto load_v = [&](int block) {
      load(shared.v[v.stage], &maps.v, &shared.v_full[v.stage], &shared.v_empty[v.stage], v.phase, block);
      v.advance();
    };

    const bool any = tile.blocks.end > tile.blocks.begin;
    if (any) load_k(tile.blocks.end - 1);
    barrier_wait(&shared.q_empty[q.stage], q.phase ^ 1);
    // Only boxes that hold a row (tma.cuh).
    const int boxes = min(Config::kWarpgroups, (tile.length_q - tile.row + Config::kQRows - 1) / Config::kQRows);
    barrier_expect_bytes(&shared.q_full[q.stage], boxes * present * Config::kQRows * kSlabRowBytes);
#pragma unroll 1
    for (int w = 0; w < boxes; ++w) {
      const RowCoordinates at(packed, Config::kQRows, tile.row + w * Config::kQRows, tile.length_q, tile.first_q);
      tma_load_tile<Config::kQRows, Config::kHeadDim>(shared.q[q.stage][w], &maps.q, &shared.q_full[q.stage], tile.head, at, once, present);
    }
    q.advance();
    // Ask for the next tile when the last few blocks of this one remain: early enough to hide the search for it, and no earlier,
    // or tiles are worked on out of order and those at work together no longer share keys in the L2 cache.
    constexpr int kAhead = 4;
    if (tile.blocks.end - tile.blocks.begin <= kAhead) barrier_arrive(&shared.tile_wanted);
    if (tile.blocks.end - 2 >= tile.blocks.begin) load_k(tile.blocks.end - 2);
    if constexpr (Config::kOutInValues) {
      barrier_wait(&shared.out_empty, out.phase ^ 1);
      out.advance();
    }
    for (int block = tile.blocks.end - 2; block >= tile.blocks.begin; --block) {
      if (block == tile.blocks.begin + kAhead - 1) barrier_arrive(&shared.tile_wanted);
      load_v(block + 1);
      if (block > tile.blocks.begin) load_k(block - 1);
    }
    if (any) load_v(tile.blocks.begin);
  }
}

}  // namespace seal::sm90
