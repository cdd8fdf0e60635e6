// The consuming side of the forward kernel: one warpgroup with 64 query rows of the tile.
#pragma once

#include "forward_common.cuh"
#include "softmax.cuh"

namespace seal::sm90 {

// Walks the key blocks of a tile from the last to the first. One step issues S' = Q K'^T of the next block and O += P V of
// the present one; the softmax of S' runs under that product and then under the products of the other warpgroups. Steps chain
// across tiles: the last step of a tile issues the first S' of the next one, and O leaves under the second.
//
// A tile of blocks n - 1 .. 0, then the next one of n' blocks, as run() goes through them; S(b) is Q K^T of block b, PV(b) the product
// with its V. A line is a call; what stands in "under them" runs while the products issued are under way:
//
//   call                  issues          waits, in order                under them              afterwards
//   begin                 S(n-1)          q_full, k_full, turn; S        O of the tile before    softmax of n-1
//                                                                        leaves
//   step<., true>         S(n-2), PV(n-1) k_full, turn; v_full; S; PV    store of the tile       (only if begun: then in place of the
//                                                                        before, softmax of n-2  first step)
//   step<., false>        S(b), PV(b+1)   k_full, turn; v_full; S; PV    softmax of b            O rescaled
//   ...
//   step_to_next_tile     S(n'-1), PV(0)  q_full, k_full, turn; v_full;  softmax of n'-1, of     O is complete; the next tile is begun
//                                         S; PV                          the next tile
//   or last_step          PV(0)           v_full; PV                                             O is complete
//
// The second one where the tiles cannot be chained: one place for Q, a next tile whose last block this warpgroup's rows do not see, or
// blocks of this tile left to skip. What holds at the top of the loop in run():
//   begun      work, softmax and scores_ are those of the tile in slot_, of whose last block scores_ holds the exponentials. The rings
//              stand behind its K and before its V.
//   finished   out_ and inverse_ are the result of the tile in the other slot, nowhere stored yet.
//   leaving_   (member) the copy engine may still read the result last stored. release_leaving() gives its place back: q_empty lets
//              warp 0 load the next tile's Q there, out_empty the present tile's V.
// Between two tiles all warpgroups take the same turns and release the same blocks, whether they see them or not: see skip().
template <class Config>
class Consumer {
  using T = typename Config::T;
  using Queries = Operand<Major::kK, Config::kQRows>;
  static constexpr int kN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  // Chaining takes two places for Q: the next tile's must be there before this tile's is done with.
  static constexpr bool kChain = Config::kQStages > 1;
  static constexpr bool kOutInValues = Config::kOutInValues;
  static constexpr bool kSpareRegisters = Config::kWarpgroups == 2;  // 232 a thread rather than 160
  static constexpr int kTurnThreads = 2 * 128;  // of the warpgroup that waits and the one that arrives
  using Tile = sm90::Tile<kN, Config::kMasking>;
  using Work = sm90::Work<Config>;
  using Whole = std::false_type;
  using Half = std::bool_constant<Work::kHalves>;

 public:
  SEAL_DEVICE Consumer(Shared<Config>& shared, const Maps& maps, const Arguments& arguments, int warpgroup)
      : shared_(shared), maps_(maps), arguments_(arguments), warpgroup_(warpgroup), warp_(warp_uniform(threadIdx.x / 32) % 4),
        lane_(threadIdx.x % 32), k_tiles_(shared.k[0]), v_tiles_(shared.v[0]), q_tiles_(shared.q[0][warpgroup]) {}

  SEAL_DEVICE void run() {
    if (warpgroup_ == Config::kWarpgroups - 1) pass_turn();
    OnlineSoftmax softmax(arguments_.scale_log2);
    Work work{};
    bool begun = false;     // the tile's first block is computed: scores_ holds its exponentials
    bool finished = false;  // out_ is the result of the tile before, to be stored
    while (true) {
      const Tile& tile = shared_.tile[slot_.stage];  // read again where needed: registers are scarce
      int block = work.end - 2;
      const bool store_under_scores = kChain && begun && block >= work.begin && work.whole(block);
      if (finished && !store_under_scores) store<!kChain>();
      if (!begun) {
        barrier_wait(&shared_.tile_full[slot_.stage], slot_.phase);
        if (tile.row < 0) break;
        work = work_of(tile);
        block = work.end - 2;
        softmax = OnlineSoftmax(arguments_.scale_log2);
        barrier_wait(&shared_.q_full[q_.stage], q_.phase);
        skip(tile.blocks.end - work.end);
        if (work.any()) begin(tile, work, softmax);
      }
      if (!store_under_scores) {
        release_leaving();
        clear_out();
      }

      begun = false;
      finished = true;
      if (work.any()) {
        pack_fragment<T>(p_, scores_);
        if (store_under_scores) step<false, true>(tile, block--, softmax);
        while (block >= work.begin) {
#pragma unroll 1
          for (; block >= work.begin && !work.whole(block); --block) step<true, false>(tile, block, softmax);
#pragma unroll 1
          for (const int last = max(work.begin, work.whole_begin); block >= last; --block) step<false, false>(tile, block, softmax);
        }
      }
      if constexpr (kOutInValues) release(&shared_.q_empty[0]);
      finish(tile, softmax);
      if (work.any()) {
        if (kChain && work.begin == tile.blocks.begin) {
          RingIndex<2> next_slot = slot_;
          next_slot.advance();
          const Tile& next_tile = shared_.tile[next_slot.stage];
          barrier_wait(&shared_.tile_full[next_slot.stage], next_slot.phase);
          if (next_tile.row >= 0) {
            work = work_of(next_tile);
            begun = work.any() && work.end == next_tile.blocks.end;
          }
          if (begun) {
            softmax = OnlineSoftmax(arguments_.scale_log2);
            if (work.half) {
              step_to_next_tile<Half>(next_tile, work, softmax);
            } else {
              step_to_next_tile<Whole>(next_tile, work, softmax);
            }
          } else {
            last_step();
          }
        } else {
          last_step();
          skip(work.begin - tile.blocks.begin);
        }
      }
      slot_.advance();
      q_.advance();
    }
    if (lane_ == 0) bulk_wait();
  }

 private:
  // ---- turns: a warpgroup issues its products only after the one before it has issued its own

  SEAL_DEVICE void take_turn() const { named_sync(kBarrierTurn + warpgroup_, kTurnThreads); }
  SEAL_DEVICE void pass_turn() const { named_arrive(kBarrierTurn + (warpgroup_ + 1) % Config::kWarpgroups, kTurnThreads); }

  // ---- buffers

  SEAL_DEVICE void release(uint64_t* empty) const {
    if (lane_ == 0) barrier_arrive(empty);
  }
  // Not before `earlier` is computed (see after() in softmax.cuh), nor what follows: arrivals and waits keep their order.
  SEAL_DEVICE void release_keys(float earlier = 0.f) {
    release(&shared_.k_empty[k_.stage] + (__float_as_uint(earlier) & arguments_.zero));
    k_.advance();
  }
  SEAL_DEVICE void release_values() {
    release(&shared_.v_empty[v_.stage]);
    v_.advance();
  }
  // The place from which the O of the tile before leaves, once it has been copied.
  SEAL_DEVICE void release_leaving() {
    if (leaving_ && lane_ == 0) {
      bulk_wait_read();
      barrier_arrive(kOutInValues ? &shared_.out_empty : &shared_.q_empty[q_.stage ^ 1]);
    }
    leaving_ = false;
  }
  // Blocks that only other warpgroups need: everyone takes every turn and releases every block.
  SEAL_DEVICE void skip(int blocks) {
    if (kOutInValues && blocks > 0) release_leaving();
    for (int i = 0; i < blocks; ++i) {
      barrier_wait(&shared_.k_full[k_.stage], k_.phase);
      release_keys();
      take_turn();
      pass_turn();
      barrier_wait(&shared_.v_full[v_.stage], v_.phase);
      release_values();
    }
  }

  // ---- the mask

  SEAL_DEVICE int slot_of(const Tile& tile) const { return &tile == shared_.tile ? 0 : 1; }

  SEAL_DEVICE Work work_of(const Tile& tile) const {
    if constexpr (Config::kLimitsInShared) {
      return shared_.work[slot_of(tile)][warpgroup_];
    } else {
      return Work::of(tile, arguments_.sequences.mask, warpgroup_);
    }
  }

  // What this thread's rows see of a block; columns are counted from the thread's first.
  SEAL_DEVICE void mask(const Tile& tile, int block) {
    if constexpr (Config::kLimitsInShared) {
      const uint32_t lane = fresh_lane();  // keeps the addresses out of the registers of the loop
      const int column = tile.blocks.place(block) * kN + 2 * (lane % 4);
      const RowLimits* const limits = shared_.limits[slot_of(tile)] + 64 * warpgroup_ + 16 * warp_ + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowLimits of_row = limits[8 * r];
        mask_row<true>(scores_, r, {of_row.begin - column, of_row.end - column}, of_row.sink_end - column);
      }
      return;
    }
    const int column = tile.blocks.place(block) * kN + 2 * (lane_ % 4);
    const int first_position = tile.row + 64 * warpgroup_ + 16 * warp_ + lane_ / 4 + tile.length_k - tile.length_q;
    const HeadMask<Config::kMasking> head_mask(arguments_.sequences.mask, tile.head);
    Span seen[2];
    int sink_end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = first_position + 8 * r;
      const Span keys = head_mask.keys(position, tile.length_k);
      seen[r] = {keys.begin - column, keys.end - column};
      sink_end[r] = head_mask.sink_end(position, tile.length_k) - column;
    }
    mask_scores<Config::kMasking == Masking::kGeneral>(scores_, seen, sink_end);
  }

  // ---- products. Each product and the wait for it lie on one straight path of code, or ptxas serialises them.

  template <class IsHalf>
  SEAL_DEVICE void multiply_keys(Queries queries) {
    const auto keys = k_tiles_.advanced(k_.stage * Config::kKBytes);
    constexpr int kColumns = IsHalf::value ? kN / 2 : kN;
    auto& scores = reinterpret_cast<float(&)[kColumns / 2]>(scores_[0]);
    wgmma_fence();
    if constexpr (Config::kQueriesInRegisters) {
      product<T>(scores, queries_, keys, false);
    } else {
      product<T, kHeadDim>(scores, queries, keys, false);
    }
    wgmma_commit();
  }

  SEAL_DEVICE void multiply_values() {
    barrier_wait(&shared_.v_full[v_.stage], v_.phase);
    wgmma_fence();
    product<T>(out_, p_, v_tiles_.advanced(v_.stage * Config::kKBytes), true);
    wgmma_commit();
  }

  // Before the first product with a tile's queries.
  SEAL_DEVICE void load_queries(int stage) {
    if constexpr (Config::kQueriesInRegisters) {
      const uint32_t lane = fresh_lane();
      const uint32_t start = smem_address(shared_.q[stage][warpgroup_]) + swizzled(16 * warp_ + lane % 16, lane / 16);
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        ldmatrix(reinterpret_cast<uint32_t(&)[4]>(queries_[4 * step]), chunk_pair(start, step));
      }
    }
  }
  // From the address of a row's chunk 0 or 1 to that of chunk 2 * pair or 2 * pair + 1: rows are 128 bytes, aligned, so
  // that the swizzled chunk differs in two bits.
  static SEAL_DEVICE uint32_t chunk_pair(uint32_t start, int pair) {
    return (start ^ (pair % 4 << 5)) + pair / 4 * Config::kQRows * kSlabRowBytes;
  }

  SEAL_DEVICE Queries queries_at(int stage) const { return q_tiles_.advanced(stage * Config::kWarpgroups * Config::kQBytes); }

  SEAL_DEVICE void clear_out() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out_[i] = 0.f;
  }
  SEAL_DEVICE void rescale_out() {
    if (!__any_sync(0xffffffffu, factor_[0] != 1.f || factor_[1] != 1.f)) return;  // the rule: see OnlineSoftmax
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out_[i] *= factor_[(i / 2) % 2];
  }

  // ---- steps

  // The softmax of S' and the end of the product P V that runs meanwhile. The order is what counts: the maximum of row 0, then
  // its exponentials over the maximum of row 1, the wait for the product among them, and over the rest rescaling and packing.
  template <bool kMasked>
  SEAL_DEVICE void softmax_over_product(OnlineSoftmax& softmax) {
    const uint32_t zero = arguments_.zero;
    const float looked_through = softmax.template raise_maximum<kMasked>(0, scores_, factor_[0], 0.f, 0);
    softmax.template raise_maximum<kMasked>(1, scores_, factor_[1], looked_through, zero);
    softmax.template exponentiate<kMasked>(0, scores_, factor_[0]);
    release_keys(scores_[kN / 4]);
    softmax.template exponentiate<kMasked>(1, scores_, factor_[1]);
    wgmma_wait<0>();
    release_values();
  }

  // The first block of a tile, when no tile before could do it.
  SEAL_DEVICE void begin(const Tile& tile, const Work& work, OnlineSoftmax& softmax) {
    load_queries(q_.stage);
    barrier_wait(&shared_.k_full[k_.stage], k_.phase);
    take_turn();
    multiply_keys<Whole>(queries_at(q_.stage));
    pass_turn();
    release_leaving();
    wgmma_wait<0>();
    release_keys();
    mask(tile, work.end - 1);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      softmax.template raise_maximum<true>(row, scores_, factor_[row], 0.f, 0);
      softmax.template exponentiate<true>(row, scores_, factor_[row]);
    }
  }

  // S' of `block`, P V of the block before. kStore: the result of the tile before is still in out_ and leaves under S'; the
  // turn passes before that, which takes longer than the other warpgroup's softmax.
  template <bool kMasked, bool kStore>
  SEAL_DEVICE void step(const Tile& tile, int block, OnlineSoftmax& softmax) {
    barrier_wait(&shared_.k_full[k_.stage], k_.phase);
    take_turn();
    multiply_keys<Whole>(queries_at(q_.stage));
    if constexpr (kStore) {
      pass_turn();
      store<true>();
      clear_out();
    } else if constexpr (Config::kRescaleLate) {
      rescale_out();
    }
    multiply_values();
    if constexpr (!kStore) pass_turn();
    wgmma_wait<1>();
    if constexpr (kMasked) mask(tile, block);
    softmax_over_product<kMasked>(softmax);
    pack_fragment<T>(p_, scores_);
    if constexpr (!Config::kRescaleLate) rescale_out();
    if constexpr (kStore) release_leaving();
  }

  // The last P V of a tile, together with the first S' of the next one. `out_` is complete then.
  template <class IsHalf>
  SEAL_DEVICE void step_to_next_tile(const Tile& next_tile, const Work& next_work, OnlineSoftmax& softmax) {
    RingIndex<Config::kQStages> next_q = q_;
    next_q.advance();
    barrier_wait(&shared_.q_full[next_q.stage], next_q.phase);
    load_queries(next_q.stage);
    barrier_wait(&shared_.k_full[k_.stage], k_.phase);
    take_turn();
    multiply_keys<IsHalf>(queries_at(next_q.stage));
    if constexpr (Config::kRescaleLate) rescale_out();
    multiply_values();
    pass_turn();
    wgmma_wait<1>();
    mask(next_tile, next_work.end - 1);  // in a half block also what was not computed
    softmax_over_product<true>(softmax);
  }

  // The last P V of a tile.
  SEAL_DEVICE void last_step() {
    if constexpr (Config::kRescaleLate) rescale_out();
    multiply_values();
    wgmma_wait<0>();
    release_values();
  }

  // ---- the result

  // Writes the log-sum-exp; leaves 1 / sum for store(). Comes before the last product, so that the softmax state is free.
  SEAL_DEVICE void finish(const Tile& tile, OnlineSoftmax& softmax) {
    float lse[2];
    softmax.finish(inverse_, lse);
    if (lane_ % 4 == 0) {
      const int first_row = tile.row + 64 * warpgroup_ + 16 * warp_;
      float* lse_row = arguments_.lse + tile.head * arguments_.lse_head_stride +
                       (arguments_.sequences.packed() ? static_cast<int64_t>(tile.first_q) : tile.sequence * arguments_.lse_sequence_stride);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + lane_ / 4 + 8 * r;
        if (row < tile.length_q) lse_row[row] = lse[r];
      }
    }
  }

  // Writes the finished rows to shared memory. kOffset: there may be an offset.
  template <bool kOffset>
  SEAL_DEVICE void stage_out(uint32_t start, const float2* scale, const float* offset_row, uint32_t lane) {
#pragma unroll
    for (int pair = 0; pair < kHeadDim / 16; ++pair) {  // 16 columns: two accumulator groups of 8
      // An absent slab stays as it is: its place must hold zeros for the next Q or V.
      if (pair / 4 >= Config::present_slabs(arguments_.head_dim)) break;
      float o[8];
      const float2 factors[2] = {scale[8 * pair], scale[8 * pair + 4]};
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] = out_[8 * pair + i] * inverse_[i / 2 % 2] * (i % 2 == 0 ? factors[i / 4].x : factors[i / 4].y);
      if (kOffset && offset_row != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int channel = 16 * pair + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
          if (channel < arguments_.head_dim) o[i] += offset_row[channel * arguments_.offset.channel_stride];
        }
      }
      stmatrix(chunk_pair(start, pair), pack<T>(o[0], o[1]), pack<T>(o[2], o[3]), pack<T>(o[4], o[5]), pack<T>(o[6], o[7]));
    }
  }

  // Sends out_, the result of the tile before, on its way. kOwnCode: with code of its own for calls without offset, which
  // takes more registers.
  template <bool kOwnCode>
  SEAL_DEVICE void store() {
    const int slot = slot_.stage ^ 1;
    const Tile& tile = shared_.tile[slot];
    const uint32_t lane = fresh_lane();  // keeps the addresses below out of the registers of the loop
    const int first_row = tile.row + 64 * warpgroup_ + 16 * warp_;  // of this warp

    // O goes through the shared memory of this warpgroup's own Q, once all four warps have finished reading that; or, where Q has
    // one place only, through that of V, once all warpgroups have. Each warp stores its 16 rows.
    const float2* scale = reinterpret_cast<const float2*>(shared_.scale[slot]) + lane % 4;
    const ChannelTensor& offset = arguments_.offset;  // rare: read from global memory
    const float* offset_row =
        offset.data == nullptr ? nullptr : offset.data + tile.sequence * offset.batch_stride + tile.head * offset.head_stride;
    uint8_t* staging = kOutInValues ? shared_.v[warpgroup_] : shared_.q[kChain ? q_.stage ^ 1 : 0][warpgroup_];
    const uint32_t start = smem_address(staging) + swizzled(16 * warp_ + lane % 16, lane / 16);
    if constexpr (kOutInValues) {
      named_sync(kBarrierWarpgroup, 128 * Config::kWarpgroups);
    } else {
      named_sync(kBarrierWarpgroup + warpgroup_, 128);
    }
    if (kOwnCode && kSpareRegisters && offset_row == nullptr) {
      stage_out<false>(start, scale, nullptr, lane);
    } else {
      stage_out<true>(start, scale, offset_row, lane);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      if (first_row < tile.length_q) {  // no box without a row: see the loading of Q
        const RowCoordinates at(arguments_.sequences.packed(), 16, first_row, tile.length_q, tile.first_q);
#pragma unroll
        for (int slab = 0; slab < slabs(kHeadDim); ++slab) {
          if (slab >= Config::present_slabs(arguments_.head_dim)) break;
          tma_store(&maps_.out, staging + (slab * Config::kQRows + 16 * warp_) * kSlabRowBytes, slab * kSlabColumns, tile.head, at);
        }
      }
      bulk_commit();
      barrier_arrive(&shared_.tile_empty[slot]);
    }
    leaving_ = true;
  }
  static_assert(Config::kQStages <= 2);

  Shared<Config>& shared_;
  const Maps& maps_;
  const Arguments& arguments_;
  const int warpgroup_, warp_, lane_;
  const Operand<Major::kK, kN> k_tiles_;
  const Operand<Major::kMN, kN> v_tiles_;
  const Queries q_tiles_;  // of the first stage
  RingIndex<2> slot_;
  RingIndex<Config::kQStages> q_;
  RingIndex<Config::kKStages> k_;
  RingIndex<Config::kVStages> v_;

  bool leaving_ = false;  // O of the tile before may still be on its way out of shared memory

  uint32_t queries_[Config::kQueriesInRegisters ? kHeadDim / 4 : 1];  // Q as the A operand
  float scores_[kN / 2];     // S, then its exponentials
  uint32_t p_[kN / 4];       // those as the A operand
  float out_[kHeadDim / 2];
  float inverse_[2];         // 1 / sum of the finished softmax
  float factor_[2];          // what the last softmax update asked `out_` to be multiplied by
};

}  // namespace seal::sm90
