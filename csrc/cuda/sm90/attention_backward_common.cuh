// What the kernels of the attention backward share: their arguments, the map from tiles to sequences, the mask of a tile
// and the way an fp32 tile leaves for global memory (inverse rotation, rounding, 16-byte stores).
//
// Padded rows. Per-row vectors (lse2, delta) and the fp32 dQ have a row space of their own, in which every sequence starts
// at a multiple of kTileRows: no tile is shared by two sequences, and a whole tile may always be read or added to. Sequence b
// of a packed batch starts at tile cu[b] / kTileRows + b, which needs no host-side knowledge of the lengths; tiles of keys are
// numbered in the same way.
#pragma once

#include "../attention_backward.h"
#include "backward_switches.cuh"
#include "wgmma.cuh"

namespace seal::sm90 {

constexpr int kTileRows = 128;

struct BackwardKernelParams : AttentionBackwardParams {
  int32_t key_rows;            // keys of a tile
  int32_t tiles_q, tiles_k;    // tiles of kTileRows queries, key_rows keys: of a sequence (dense), of the batch (packed, bound)
  int64_t padded_rows_q;       // rows of the padded space of q, all sequences
  int64_t tile_count_q, tile_count_k;  // of all sequences
  int32_t heads_per_cta;       // query heads that one CTA of the main kernel walks through: a divisor of heads_q / heads_k
  int32_t splits;              // heads_q / heads_k / heads_per_cta; > 1: dK and dV leave as fp32 partial sums
  int32_t section;             // (batch row, head, split) pairs whose tiles are interleaved in launch order
  int32_t last_section;        // first pair of the last section, which reaches to the end
  int32_t task_count;          // tiles of keys times pairs
  int32_t* task_counter;       // tasks claimed beyond the first of each CTA; attention_backward_rows sets it to 0

  float *lse2, *delta;         // [heads_q, padded_rows_q]: lse * log2(e) (+inf: no probability), rowsum(g * (out - offset)) - grad_lse
  float* dq;                   // [heads_q, padded_rows_q, D] in accumulator order
  int32_t* turns;              // [heads_q, padded_rows_q / step_rows, 2]: tiles of keys that have added their dQ; null: in any order
  float *dk_partial, *dv_partial;            // [splits][heads_k, tile_count_k, key_rows * D], accumulator order
  float *dscale_partial, *doffset_partial;   // [tile_count_q, heads_q, D]: columns of g * out, of g
  float* dscale_exact;                       // [tile_count_k, heads_q, D]: columns of V * (P^T g), of the heads that need it
  void* scaled_grad;           // [rows of q, heads_q, head_dim]: scale * g, 16-bit
};

// Where a row of a tile stands in lse2 and delta: of every 16 rows, those of the accumulator columns that one thread holds (2 q,
// 2 q + 1, 8 + 2 q, 8 + 2 q + 1) follow each other, so that it reads them at once (read_columns).
SEAL_DEVICE int place_in_vector(int row) {
  return kQuadVectors ? (row & ~15) | row % 8 / 2 * 4 | row / 8 % 2 * 2 | row % 2 : row;
}

// The values of a row vector in shared memory that belong to a thread's accumulator columns: of columns 8 j + 2 (lane % 4) + {0, 1}
// values[j].
template <int kPairs>
SEAL_DEVICE void read_columns(float2 (&values)[kPairs], const float* vector, uint32_t quad_lane) {
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) {
    if constexpr (kQuadVectors) {
      const float4 four = *reinterpret_cast<const float4*>(vector + 8 * j + 4 * quad_lane);
      values[j] = make_float2(four.x, four.y);
      values[j + 1] = make_float2(four.z, four.w);
    } else {
      values[j] = *reinterpret_cast<const float2*>(vector + 8 * j + 2 * quad_lane);
      values[j + 1] = *reinterpret_cast<const float2*>(vector + 8 * j + 8 + 2 * quad_lane);
    }
  }
}

struct Sequence {
  int index;                   // batch row or number of the packed sequence
  int first_q, first_k;        // its first row in a packed tensor; dense: 0
  int length_q, length_k;
  int64_t padded_q;            // its first row in the padded space

  // Query i sees keys i + shift() - left .. i + shift() + right.
  SEAL_DEVICE int shift() const { return length_k - length_q; }
};

SEAL_DEVICE Sequence sequence(const BackwardKernelParams& p, int index) {
  Sequence s;
  s.index = index;
  if (p.cu_seqlens_q != nullptr) {
    s.first_q = p.cu_seqlens_q[index];
    s.first_k = p.cu_seqlens_k[index];
    s.length_q = p.cu_seqlens_q[index + 1] - s.first_q;
    s.length_k = p.cu_seqlens_k[index + 1] - s.first_k;
    s.padded_q = (static_cast<int64_t>(s.first_q / kTileRows) + index) * kTileRows;
  } else {
    s.first_q = s.first_k = 0;
    s.length_q = p.seqlen_q;
    s.length_k = p.seqlen_k;
    s.padded_q = static_cast<int64_t>(index) * p.tiles_q * kTileRows;
  }
  return s;
}

// The packed sequence that tile `tile` of `rows` rows belongs to; all lanes of a converged warp call it.
SEAL_DEVICE int find_sequence(const int32_t* cu_seqlens, int rows, int batch, int tile) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = batch;  // the largest b in [low, high) whose first tile is not after `tile`
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int b = low + lane * step;
    const bool reached = b < high && cu_seqlens[b] / rows + b <= tile;
    low += (__popc(__ballot_sync(0xffffffffu, reached)) - 1) * step;
    high = min(high, low + step);
  }
  return low;
}

// Tile `tile` of `rows` queries or keys (as cu_seqlens says) as (sequence, tile inside it).
SEAL_DEVICE Sequence locate(const BackwardKernelParams& p, const int32_t* cu_seqlens, int rows, int tile, int batch_row, int* local_tile) {
  if (cu_seqlens == nullptr) {
    *local_tile = tile;
    return sequence(p, batch_row);
  }
  const int index = find_sequence(cu_seqlens, rows, p.batch, tile);
  *local_tile = tile - (cu_seqlens[index] / rows + index);
  return sequence(p, index);
}

// Launch order: inside a section of pairs all first tiles come first, then all second ones, ... so that the longest tiles
// start early while a section's rows stay in L2. `pairs` are (batch row, head, split), the last one fastest; all from
// `last_section` on are one section.
struct LaunchOrder {
  int tile, pair;

  SEAL_DEVICE LaunchOrder(int block, int tiles, int pairs, int section, int last_section) {
    const int first = min(block / (section * tiles) * section, last_section);
    const int width = first < last_section ? min(section, pairs - first) : pairs - first;
    const int rest = block - first * tiles;
    tile = rest / width;
    pair = first + rest % width;
  }
};

// Whether the gradient of this head's scale must come from P^T g. Elsewhere it is rowsum(g * out) / scale, which costs nothing
// beside delta; but a zero cannot be divided by, a tiny or huge scale may have cost `out` its precision (fp16), and an offset
// would have to be subtracted from the rounded `out`. All lanes of a converged warp call it.
SEAL_DEVICE bool needs_exact_dscale(const BackwardKernelParams& p, int index, int head) {
  if (p.offset != nullptr) return true;
  const float low = p.half ? 0x1p-4f : 0x1p-40f, high = p.half ? 0x1p8f : 0x1p60f;
  const float* const scale = p.scale + index * p.scale_batch_stride + head * p.scale_head_stride;
  bool unfit = false;
#pragma unroll(kPersistent || kLateExact ? 1 : 4)
  for (int channel = threadIdx.x % 32; channel < (p.scale_channel_stride == 0 ? 1 : p.head_dim); channel += 32) {
    const float size = fabsf(scale[channel * p.scale_channel_stride]);
    unfit |= !(size >= low && size <= high);
  }
  return __any_sync(0xffffffffu, unfit);
}

// A value equal in all lanes, in a uniform register from the start (the result of a reduction over the warp is one): what is
// derived from it then costs no register of the threads, of which the accumulators leave few.
SEAL_DEVICE uint32_t uniform_register(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

// The descriptor of k16 step `step`, made at this place: hoisted out of a loop, the descriptors of all steps of all resident
// operands do not fit in the uniform registers.
template <Major kMajor, int kRows>
SEAL_DEVICE uint64_t descriptor_of(const Operand<kMajor, kRows>& operand, int step) {
  const uint64_t first = operand.at(0);
  uint32_t low;
  asm volatile("add.u32 %0, %1, %2;" : "=r"(low) : "r"(static_cast<uint32_t>(first)), "r"(static_cast<uint32_t>(operand.at(step) - first)));
  return (first & 0xffffffff00000000u) | low;
}

// product() of wgmma.cuh with such descriptors.
template <class T, int kK, Major kMajorA, int kRowsA, Major kMajorB, int kRowsB, int kAcc>
SEAL_DEVICE void lean_product(float (&acc)[kAcc], Operand<kMajorA, kRowsA> a, Operand<kMajorB, kRowsB> b, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    Wgmma<T, 2 * kAcc>::template ss<kMajorA == Major::kMN, kMajorB == Major::kMN>(acc, descriptor_of(a, step), descriptor_of(b, step),
                                                                                 accumulate || step > 0);
  }
}

struct BackwardMaps {
  CUtensorMap q, k, v, grad_out, unscaled_grad_out;
  CUtensorMap grad_k, grad_v;  // for boxes of 16 rows
};

// Stage of a ring and parity of its round in step `step`.
template <int kStages>
SEAL_DEVICE int stage_of(int step) { return step % kStages; }
template <int kStages>
SEAL_DEVICE uint32_t phase_of(int step) { return step / kStages % 2; }

SEAL_DEVICE float read_as_float(const void* data, int64_t index, int type) {
  if (type == 2) return __ldg(static_cast<const float*>(data) + index);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(data) + index);
  return type == 0 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

SEAL_DEVICE int64_t position_of(const BackwardPositions& positions, int batch_row, int64_t token) {
  if (positions.data == nullptr) return positions.first + token;
  const int64_t at = batch_row * positions.batch_stride + token * positions.token_stride;
  return positions.is_int64 ? __ldg(static_cast<const long long*>(positions.data) + at) : __ldg(static_cast<const int*>(positions.data) + at);
}

// Rows of an fp32 tile in shared memory end in kPad floats: with D + 8 words a row, the accumulator's float2 writes have no
// bank conflicts.
constexpr int kPad = 8;

// One warp writes rows [first_row, first_row + rows) of a tile of kStride floats a row to
// global memory, times `factor`, after the inverse rotation where `rotate`. `token` is the tensor's row (packed: of the
// whole tensor) of tile row 0; rows from `rows` on are left alone.
template <class T, int kD>
SEAL_DEVICE void store_rows(const BackwardKernelParams& p, const float* tile, int rows, void* output, int64_t token, int batch_row,
                            int64_t rows_per_batch, int head, int heads, float factor, bool rotate, const BackwardPositions& positions) {
  constexpr int kChunks = kD / 8;
  constexpr int kRowsAtOnce = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const int lane = threadIdx.x % 32;
  if (kPlainStores && !rotate) {  // several rows at a time on their way
    const int channel = lane % kChunks * 8;
    if (channel >= p.head_dim) return;
    const int64_t stride = static_cast<int64_t>(heads) * p.head_dim;
    T* const to = static_cast<T*>(output) + (batch_row * rows_per_batch + token) * stride + head * p.head_dim + channel;
#pragma unroll 4
    for (int row = lane / kChunks; row < rows; row += kRowsAtOnce) {
      const float4* const values = reinterpret_cast<const float4*>(tile + row * (kD + kPad) + channel);
      const float4 a = values[0], b = values[1];
      *reinterpret_cast<uint4*>(to + row * stride) = make_uint4(pack<T>(a.x * factor, a.y * factor), pack<T>(a.z * factor, a.w * factor),
                                                                pack<T>(b.x * factor, b.y * factor), pack<T>(b.z * factor, b.w * factor));
    }
    return;
  }
  for (int row = lane / kChunks; row < rows; row += kRowsAtOnce) {
    const int channel = lane % kChunks * 8;
    if (channel >= p.head_dim) continue;
    const float* values = tile + row * (kD + kPad);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = values[channel + i];
    if (rotate && channel < p.rotary_dim) {
      const int half = p.rotary_dim / 2;
      const int64_t wanted = position_of(positions, batch_row, token + row);
      const bool inside = wanted >= 0 && wanted < p.cos_rows;
      const int64_t position = inside ? wanted : 0;
      const int64_t cos_row = batch_row * p.cos_batch_stride + position * p.cos_row_stride;
      const int64_t sin_row = batch_row * p.sin_batch_stride + position * p.sin_row_stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = channel + i;
        if (c >= p.rotary_dim) break;
        const bool first = p.interleaved ? c % 2 == 0 : c < half;
        const int pair = p.interleaved ? c / 2 : (first ? c : c - half);
        const int partner = p.interleaved ? c ^ 1 : (first ? c + half : c - half);
        const float cos = read_as_float(p.cos, cos_row + pair, p.cos_type), sin = read_as_float(p.sin, sin_row + pair, p.cos_type);
        x[i] = inside ? x[i] * cos + (first ? values[partner] : -values[partner]) * sin : NAN;
      }
    }
    uint4 packed;
    packed.x = pack<T>(x[0] * factor, x[1] * factor);
    packed.y = pack<T>(x[2] * factor, x[3] * factor);
    packed.z = pack<T>(x[4] * factor, x[5] * factor);
    packed.w = pack<T>(x[6] * factor, x[7] * factor);
    const int64_t at = ((batch_row * rows_per_batch + token + row) * heads + head) * static_cast<int64_t>(p.head_dim) + channel;
    *reinterpret_cast<uint4*>(static_cast<T*>(output) + at) = packed;
  }
}

// ---- host

// The head_dim of the kernels that serve `head_dim`: the copy engine fills the channels beyond it with zeros.
constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
// Queries of a step of the main kernel.
constexpr int step_rows(int padded_head_dim) { return padded_head_dim == 64 ? 128 : 64; }
// Keys of a tile of the main kernel.
constexpr int key_rows(int padded_head_dim) { return padded_head_dim == 256 ? 64 : kTileRows; }

// All launches of one dtype and padded head_dim (attention_backward_launch.cuh, instantiated in attention_backward_hd*.cu).
template <class T, int kD>
cudaError_t launch_backward(const BackwardKernelParams& p, cudaStream_t stream);

}  // namespace seal::sm90
