// The split kernel of decoding: one thread block reads one part of one KV head's keys and values for all query rows that share them.
//
// The rows of a tile are the queries of a sequence times the query heads of the KV head ("packed"), so K and V are read once whatever
// the group. A warp has 16 rows and, of every block of keys, its own share; it keeps a softmax of its own, and the shares are merged in
// the end through the ring's memory. One thread of warp 0 runs the copy engine through a ring of K and V blocks, between its own steps: a
// producing warp of its own would take the registers of four. Bytes decide here, not products: mma.sync on 16 rows costs a
// fraction of the time that a block takes to arrive (docs/kernel_notes_decode.md).
#pragma once

#include "../attention.h"
#include "forward_common.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace seal::sm90 {

template <class T_, Masking kMasking_, int kHeadDim_, int kBlockN_, int kStages_, int kRowTiles_, int kKeyWarps_, int kBlocksPerSM_>
struct DecodeConfig {
  using T = T_;
  static constexpr Masking kMasking = kMasking_;
  static constexpr int kHeadDim = kHeadDim_;      // of the shared-memory tiles; the tensors' may be smaller
  static constexpr int kBlockN = kBlockN_;        // keys of a block
  static constexpr int kStages = kStages_;        // blocks of K and of V in flight
  static constexpr int kRowTiles = kRowTiles_;    // of 16 rows
  static constexpr int kKeyWarps = kKeyWarps_;    // warps that share the keys of a block, for each row tile
  static constexpr int kBlocksPerSM = kBlocksPerSM_;
  static constexpr int kRows = 16 * kRowTiles, kWarps = kRowTiles * kKeyWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpKeys = kBlockN / kKeyWarps;
  static constexpr int kTileBytes = tile_bytes(kBlockN, kHeadDim);
  // Q as register operand; at head_dim 256 and with ten warps it is read again from shared memory.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128 && kWarps <= 8;
  // Rows of partial results while they are merged: 8 floats more than needed, so that a warp's stores meet 32 banks.
  static constexpr int kMergeStride = kHeadDim + 8;
  static_assert(kBlockN % (16 * kKeyWarps) == 0);

  // Slabs of a tile that hold columns of the tensor: at head_dim up to 128 all of them.
  SEAL_DEVICE static int present_slabs(int head_dim) { return kHeadDim <= 128 ? slabs(kHeadDim) : slabs(head_dim); }
};

template <class Config>
struct DecodeShared {
  uint8_t q[tile_bytes(Config::kRows, Config::kHeadDim)];
  union {
    struct {
      uint8_t k[Config::kStages][Config::kTileBytes], v[Config::kStages][Config::kTileBytes];
    };
    float merge[Config::kWarps][16][Config::kMergeStride];  // after the last block
  };
  float max[Config::kWarps][16], sum[Config::kWarps][16];
  uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  uint64_t v_full[Config::kStages], v_empty[Config::kStages];
};

struct DecodeMaps {
  CUtensorMap k, v;
};

struct DecodeArguments {
  Sequences sequences;
  AttentionTensor q, out;
  ChannelTensor scale, offset;
  int kv_heads, group;       // query heads of a KV head
  int head_dim;
  int row_blocks, splits;
  float scale_log2;
  float* lse;
  int64_t lse_head_stride, lse_sequence_stride;
  float* partial_out;        // [rows of q][heads][splits][head_dim]; null with one split
  float* partial_lse;        // [rows of q][heads][splits]
};

// A sequence, as one thread block sees it.
struct DecodeSequence {
  int index, length_q, length_k, first_q, first_k;  // first_*: what RowCoordinates calls `first`
};

SEAL_DEVICE DecodeSequence decode_sequence(const Sequences& s, int index) {
  if (!s.packed()) return {index, s.length_q, s.length_k, index, index};
  const int first_q = s.cu_seqlens_q[index], first_k = s.cu_seqlens_k[index];
  return {index, s.cu_seqlens_q[index + 1] - first_q, s.cu_seqlens_k[index + 1] - first_k, first_q, first_k};
}

// The keys of a tile's rows [first, last] (positions), and this split's blocks of them. Blocks are counted from `begin`; before
// them, where the sinks lie apart, those of the sinks, which end at the sinks' end.
template <int kKeys, Masking kMasking>
struct DecodeKeys {
  int begin, end;            // that some row sees
  int full_begin, full_end;  // that every row sees
  int sink_blocks = 0;
  int block, block_end;      // of this split

  SEAL_DEVICE DecodeKeys(const HeadMask<kMasking>& mask, int length_k, int first, int last, int split, int splits) {
    const Span of_first = mask.keys(first, length_k), of_last = mask.keys(last, length_k);
    begin = max(0, of_first.begin);
    end = of_last.end;
    full_begin = max(0, of_last.begin);
    full_end = of_first.end;
    if constexpr (kMasking == Masking::kGeneral) {
      const int sink_end = mask.sink_end(last, length_k);
      if (sink_end >= begin || end <= begin) {
        end = end <= begin ? sink_end : max(end, sink_end);
        begin = 0;
      } else {
        sink_blocks = (sink_end + kKeys - 1) / kKeys;
      }
    }
    const int blocks = sink_blocks + max(0, end - begin + kKeys - 1) / kKeys;
    const int share = blocks / splits, more = blocks % splits;
    block = split * share + min(split, more);
    block_end = block + share + (split < more);
  }

  SEAL_DEVICE bool of_sinks(int number) const { return kMasking == Masking::kGeneral && number < sink_blocks; }
  SEAL_DEVICE int first_key(int number) const { return of_sinks(number) ? number * kKeys : begin + (number - sink_blocks) * kKeys; }
};

// Writes one 16-byte group of four channels of the final result.
template <class T>
SEAL_DEVICE void store_scaled(void* to, const float (&o)[4], const ChannelTensor& scale, const ChannelTensor& offset, int64_t sequence, int head,
                              int channel) {
  float r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r[i] = o[i];
    if (scale.data != nullptr) {
      r[i] *= scale.data[sequence * scale.batch_stride + head * scale.head_stride + (channel + i) * scale.channel_stride];
    }
    if (offset.data != nullptr) {
      r[i] += offset.data[sequence * offset.batch_stride + head * offset.head_stride + (channel + i) * offset.channel_stride];
    }
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(r[0], r[1]), pack<T>(r[2], r[3]));
}

template <class Config>
class DecodeTile {
  using T = typename Config::T;
  using Keys = DecodeKeys<Config::kBlockN, Config::kMasking>;
  static constexpr int kHeadDim = Config::kHeadDim, kBlockN = Config::kBlockN, kWarpKeys = Config::kWarpKeys;

 public:
  SEAL_DEVICE DecodeTile(DecodeShared<Config>& shared, const DecodeMaps& maps, const DecodeArguments& arguments, int kv_head, int split,
                         const DecodeSequence& sequence)
      : shared_(shared), maps_(maps), a_(arguments), kv_head_(kv_head), split_(split), sequence_(sequence),
        warp_(warp_uniform(threadIdx.x / 32)), lane_(threadIdx.x % 32), present_(Config::present_slabs(arguments.head_dim)) {}

  // The tile of packed rows that starts at `row`, from its loads to its results.
  SEAL_DEVICE void run(int row) {
    const int rows = min(Config::kRows, sequence_.length_q * a_.group - row);
    const int shift = sequence_.length_k - sequence_.length_q;
    const Keys keys(mask(), sequence_.length_k, row / a_.group + shift, (row + rows - 1) / a_.group + shift, split_, a_.splits);
    // The first blocks are on their way before Q is.
    if (produces()) {
      for (int block = keys.block; block < min(keys.block_end, keys.block + Config::kStages); ++block) load(keys, block);
    }
    load_queries(row, rows);
    __syncthreads();
    consume(keys, row, rows, shift);
    __syncthreads();
    leave_share();
    __syncthreads();
    merge(row, rows);
  }

  // The thread that issues loads, and before them initialises the barriers.
  SEAL_DEVICE static bool produces() { return threadIdx.x == 0; }

 private:
  // All query heads of a key/value head have one.
  SEAL_DEVICE HeadMask<Config::kMasking> mask() const { return {a_.sequences.mask, kv_head_ * a_.group}; }

  SEAL_DEVICE void load(const Keys& keys, int block) {
    const RowCoordinates at(a_.sequences.packed(), kBlockN, keys.first_key(block), sequence_.length_k, sequence_.first_k);
    const auto fill = [&](uint8_t* to, const CUtensorMap* map, uint64_t* full, uint64_t* empty) {
      barrier_wait(empty, load_ring_.phase ^ 1);
      barrier_expect_bytes(full, present_ * kBlockN * kSlabRowBytes);
      tma_load_tile<kBlockN, kHeadDim>(to, map, full, kv_head_, at, NoPolicy{}, present_);
    };
    fill(shared_.k[load_ring_.stage], &maps_.k, &shared_.k_full[load_ring_.stage], &shared_.k_empty[load_ring_.stage]);
    fill(shared_.v[load_ring_.stage], &maps_.v, &shared_.v_full[load_ring_.stage], &shared_.v_empty[load_ring_.stage]);
    load_ring_.advance();
  }

  // Packed row r is query r / group and, of the KV head's query heads, the (r % group)th.
  SEAL_DEVICE int head_of(int row) const { return kv_head_ * a_.group + row % a_.group; }
  SEAL_DEVICE int64_t token_of(int row) const {
    const int query = row / a_.group;
    return a_.sequences.packed() ? sequence_.first_q + query : static_cast<int64_t>(sequence_.index) * a_.sequences.length_q + query;
  }

  SEAL_DEVICE void load_queries(int row, int rows) {
    const AttentionTensor& q = a_.q;
    constexpr int kChunks = kHeadDim / 8;
    for (int i = threadIdx.x; i < Config::kRows * kChunks; i += 32 * Config::kWarps) {
      const int r = i / kChunks, chunk = i % kChunks;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (r < rows && chunk * 8 < a_.head_dim) {
        const int query = (row + r) / a_.group;
        const int64_t at = (a_.sequences.packed() ? (sequence_.first_q + query) * q.row_stride : sequence_.index * q.batch_stride + query * q.row_stride) +
                           head_of(row + r) * q.head_stride + chunk * 8;
        value = *reinterpret_cast<const uint4*>(static_cast<const T*>(q.data) + at);
      }
      *reinterpret_cast<uint4*>(shared_.q + chunk / 8 * (Config::kRows * kSlabRowBytes) + swizzled(r, chunk % 8)) = value;
    }
  }

  // ---- the loop over the split's blocks

  SEAL_DEVICE int row_tile() const { return warp_ % Config::kRowTiles; }
  SEAL_DEVICE int key_warp() const { return warp_ / Config::kRowTiles; }

  SEAL_DEVICE void release(uint64_t* empty) const {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(empty);
  }

  SEAL_DEVICE void consume(const Keys& keys, int row, int rows, int shift) {
    softmax_ = OnlineSoftmax(a_.scale_log2);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out_[i] = 0.f;
    Span seen[2];  // keys that the thread's two rows see; rows that do not exist see what the last one sees
    int sink_end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = min(16 * row_tile() + lane_ / 4 + 8 * r, rows - 1);
      const int position = (row + own) / a_.group + shift;
      seen[r] = mask().keys(position, sequence_.length_k);
      sink_end[r] = mask().sink_end(position, sequence_.length_k);
    }
    const auto queries = pieces_a<Config::kRows>(smem_address(shared_.q), 16 * row_tile(), lane_);
    if constexpr (Config::kQueriesInRegisters) {
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) ldmatrix(queries_[step], queries.at(step));
    }
    const auto k_pieces = pieces_b<kBlockN>(smem_address(shared_.k[0]), key_warp() * kWarpKeys, lane_);
    const auto v_pieces = pieces_b_transposed<kBlockN>(smem_address(shared_.v[0]), key_warp() * kWarpKeys, lane_);
#pragma unroll 1
    for (int block = keys.block; block < keys.block_end; ++block) {
      // Into the place of the block before, which all warps are done with soon.
      const int ahead = block - 1 + Config::kStages;
      if (produces() && block > keys.block && ahead < keys.block_end) load(keys, ahead);
      __syncwarp();
      const int first = keys.first_key(block) + key_warp() * kWarpKeys;
      barrier_wait(&shared_.k_full[ring_.stage], ring_.phase);
      float scores[kWarpKeys / 2];
      multiply_keys(scores, k_pieces, queries);
      release(&shared_.k_empty[ring_.stage]);
      if (first >= keys.full_begin && first + kWarpKeys <= keys.full_end && !keys.of_sinks(block)) {
        update<false>(scores);
      } else {
        const int column = first + 2 * (lane_ % 4);
        // Keys of the band that a block of sinks reaches into come in a later block.
        const auto end = [&](int row) { return keys.of_sinks(block) ? min(seen[row].end, keys.begin) : seen[row].end; };
        mask_scores<Config::kMasking == Masking::kGeneral>(
            scores, {{seen[0].begin - column, end(0) - column}, {seen[1].begin - column, end(1) - column}}, {sink_end[0] - column, sink_end[1] - column});
        update<true>(scores);
      }
      uint32_t p[kWarpKeys / 4];
      pack_fragment<T>(p, scores);
      barrier_wait(&shared_.v_full[ring_.stage], ring_.phase);
      multiply_values(p, v_pieces);
      release(&shared_.v_empty[ring_.stage]);
      ring_.advance();
    }
  }

  // S = Q K^T of the warp's keys. Even and odd channels are summed apart: dependent chains of half the length.
  SEAL_DEVICE void multiply_keys(float (&scores)[kWarpKeys / 2], Pieces<kBlockN> pieces, const Pieces<Config::kRows>& queries) const {
    pieces.row_address += ring_.stage * Config::kTileBytes;
    float odd[kWarpKeys / 2];
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) scores[i] = odd[i] = 0.f;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      if (kHeadDim > 128 && step / 4 >= present_) break;
      uint32_t q[4];
      if constexpr (Config::kQueriesInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[i] = queries_[step][i];
      } else {
        ldmatrix(q, queries.at(step));
      }
#pragma unroll
      for (int pair = 0; pair < kWarpKeys / 16; ++pair) {
        uint32_t k[4];
        ldmatrix(k, pieces.at(step) + pair * 16 * kSlabRowBytes);
        float* const into = (step % 2 == 0 ? scores : odd) + 8 * pair;
        mma<T>(into, q, k[0], k[1]);
        mma<T>(into + 4, q, k[2], k[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) scores[i] += odd[i];
  }

  // Scores to exponentials; rescales the output where a maximum has risen by more than the softmax's slack.
  template <bool kMasked>
  SEAL_DEVICE void update(float (&scores)[kWarpKeys / 2]) {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) softmax_.template raise_maximum<kMasked>(row, scores, factor[row], 0.f, 0);
    if (__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out_[i] *= factor[i / 2 % 2];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) softmax_.template exponentiate<kMasked>(row, scores, factor[row]);
  }

  // O += P V of the warp's keys.
  SEAL_DEVICE void multiply_values(const uint32_t (&p)[kWarpKeys / 4], Pieces<kBlockN> pieces) {
    pieces.row_address += ring_.stage * Config::kTileBytes;
#pragma unroll
    for (int step = 0; step < kWarpKeys / 16; ++step) {
      const uint32_t a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
#pragma unroll
      for (int pair = 0; pair < kHeadDim / 16; ++pair) {
        if (kHeadDim > 128 && pair / 4 >= present_) break;
        uint32_t v[4];
        ldmatrix_transposed(v, pieces.at(pair) + step * 16 * kSlabRowBytes);
        mma<T>(out_ + 8 * pair, a, v[0], v[1]);
        mma<T>(out_ + 8 * pair + 4, a, v[2], v[3]);
      }
    }
  }

  // ---- the end: the warps' shares of the keys are merged

  SEAL_DEVICE void leave_share() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_ / 4 + 8 * r;
      float sum = softmax_.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane_ % 4 == 0) {
        shared_.max[warp_][row] = softmax_.max[r];
        shared_.sum[warp_][row] = sum;
      }
#pragma unroll
      for (int group = 0; group < kHeadDim / 8; ++group) {
        *reinterpret_cast<float2*>(&shared_.merge[warp_][row][8 * group + 2 * (lane_ % 4)]) =
            make_float2(out_[4 * group + 2 * r], out_[4 * group + 2 * r + 1]);
      }
    }
  }

  SEAL_DEVICE void merge(int row, int rows) {
    constexpr int kGroups = kHeadDim / 4;  // of four channels
    const int64_t heads = static_cast<int64_t>(a_.kv_heads) * a_.group;
    for (int i = threadIdx.x; i < rows * kGroups; i += 32 * Config::kWarps) {
      const int r = i / kGroups, channel = i % kGroups * 4;
      if (channel >= a_.head_dim) continue;
      float top = -INFINITY, total = 0.f, o[4] = {};
#pragma unroll
      for (int w = 0; w < Config::kKeyWarps; ++w) top = fmaxf(top, shared_.max[w * Config::kRowTiles + r / 16][r % 16]);
      const float base = top == -INFINITY ? 0.f : top;
#pragma unroll
      for (int w = 0; w < Config::kKeyWarps; ++w) {
        const int warp = w * Config::kRowTiles + r / 16;
        const float weight = exp2_approx((shared_.max[warp][r % 16] - base) * a_.scale_log2);
        total += weight * shared_.sum[warp][r % 16];
        const float4 share = *reinterpret_cast<const float4*>(&shared_.merge[warp][r % 16][channel]);
        o[0] += weight * share.x, o[1] += weight * share.y, o[2] += weight * share.z, o[3] += weight * share.w;
      }
      const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
      const float lse = total == 0.f ? -INFINITY : (base * a_.scale_log2 + log2_approx(total)) * kLn2;
#pragma unroll
      for (int c = 0; c < 4; ++c) o[c] *= inverse;
      const int head = head_of(row + r), query = (row + r) / a_.group;
      if (a_.partial_out != nullptr) {
        const int64_t at = (token_of(row + r) * heads + head) * a_.splits + split_;
        *reinterpret_cast<float4*>(a_.partial_out + at * a_.head_dim + channel) = make_float4(o[0], o[1], o[2], o[3]);
        if (channel == 0) a_.partial_lse[at] = lse;
      } else {
        const int64_t batch = a_.sequences.packed() ? sequence_.first_q * a_.out.row_stride : sequence_.index * a_.out.batch_stride;
        T* const to = static_cast<T*>(const_cast<void*>(a_.out.data)) + batch + query * a_.out.row_stride + head * a_.out.head_stride + channel;
        store_scaled<T>(to, o, a_.scale, a_.offset, sequence_.index, head, channel);
        if (channel == 0) {
          a_.lse[head * a_.lse_head_stride + (a_.sequences.packed() ? sequence_.first_q : sequence_.index * a_.lse_sequence_stride) + query] = lse;
        }
      }
    }
  }

  DecodeShared<Config>& shared_;
  const DecodeMaps& maps_;
  const DecodeArguments& a_;
  const int kv_head_, split_;
  const DecodeSequence& sequence_;
  const int warp_, lane_, present_;
  RingIndex<Config::kStages> ring_, load_ring_;
  OnlineSoftmax softmax_{0.f};
  uint32_t queries_[Config::kQueriesInRegisters ? kHeadDim / 16 : 1][4];
  float out_[kHeadDim / 2];  // not yet divided by the sum
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSM)
    attention_decode(const __grid_constant__ DecodeMaps maps, const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<DecodeShared<Config>*>(memory);
  launch_dependents();  // the combining kernel may take its place now; it waits for our results
  if (DecodeTile<Config>::produces()) {  // it alone uses the barriers before the first __syncthreads
    if (smem_address(memory) % 1024 != 0) __trap();  // the copy engine's swizzle counts from there
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(shared.k_full + i, 1);
      barrier_init(shared.v_full + i, 1);
      barrier_init(shared.k_empty + i, Config::kWarps);
      barrier_init(shared.v_empty + i, Config::kWarps);
    }
    fence_barrier_init();
  }
  // Thread blocks next to each other: the same keys, then the other heads of the same tokens (neighbours in memory), then the splits.
  int index = blockIdx.x;
  const auto next = [&](int size) {
    const int digit = index % size;
    index /= size;
    return digit;
  };
  const int row_block = next(arguments.row_blocks), kv_head = next(arguments.kv_heads), split = next(arguments.splits);
  const DecodeSequence sequence = decode_sequence(arguments.sequences, index);
  DecodeTile<Config> tile(shared, maps, arguments, kv_head, split, sequence);
#pragma unroll 1
  for (int row = row_block * Config::kRows; row < sequence.length_q * arguments.group; row += arguments.row_blocks * Config::kRows) {
    if (row >= arguments.row_blocks * Config::kRows) {  // another round: the ring's memory held shares, its next writer is the copy engine
      fence_proxy_async();
      __syncthreads();
    }
    tile.run(row);
  }
}

}  // namespace seal::sm90
