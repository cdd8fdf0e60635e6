// What the kernels of the attention backward share: their arguments, the map from tiles to sequences, the launch order, the place of
// a row in the row vectors.
//
// Padded rows. Per-row vectors (lse2, delta) and the fp32 dQ have a row space of their own, in which every sequence starts
// at a multiple of kTileRows: no tile is shared by two sequences, and a whole tile may always be read or added to. Sequence b
// of a packed batch starts at tile cu[b] / kTileRows + b, which needs no host-side knowledge of the lengths; tiles of keys are
// numbered in the same way.
#pragma once

#include "../attention_backward.h"
#include "ring.cuh"
#include "wgmma.cuh"

namespace seal::sm90 {

constexpr int kTileRows = 128;

// Named barriers; 0 is __syncthreads.
constexpr uint32_t kBarrierConsumers = 1;  // both consumer warpgroups
constexpr uint32_t kBarrierValues = 2;     // the one that makes dV (backward_wide.cuh)
constexpr uint32_t kBarrierStart = 3;      // the second consumer warpgroup starts a task half a step behind the first
constexpr uint32_t kBarrierSteps = 4;        // four: a warpgroup's step is done, by warpgroup and the step's parity

struct BackwardKernelParams : AttentionBackwardParams {
  int32_t key_rows;            // keys of a tile
  int32_t tiles_q, tiles_k;    // tiles of kTileRows queries, key_rows keys: of a sequence (dense), of the batch (packed, bound)
  int64_t padded_rows_q;       // rows of the padded space of q, all sequences
  int64_t tile_count_q, tile_count_k;  // of all sequences
  int32_t heads_per_cta;       // query heads that one thread block of the main kernel walks through: a divisor of heads_q / heads_k
  int32_t splits;              // heads_q / heads_k / heads_per_cta; > 1: dK and dV leave as fp32 partial sums
  int32_t section;             // (batch row, head, split) pairs whose tiles are interleaved in launch order
  int32_t last_section;        // first pair of the last section, which reaches to the end
  int32_t task_count;          // tiles of keys times pairs
  bool turn_by_vectors;        // half-split rotation with tables of cos and sin that 16-byte reads fit
  int32_t* task_counter;       // tasks claimed beyond the first of each thread block; attention_backward_rows sets it to 0

  float *lse2, *delta;         // [heads_q, padded_rows_q]: lse * log2(e) (+inf: no probability), rowsum(g * (out - offset)) - grad_lse
  float* dq;                   // [heads_q, padded_rows_q, D] in accumulator order
  int32_t* added;              // [heads_q, padded_rows_q / step_rows, 2]: tiles of keys that have added their dQ; null: in any order
  float *dk_partial, *dv_partial;            // [splits][heads_k, tile_count_k, key_rows * D], accumulator order
  float *dscale_partial, *doffset_partial;   // [tile_count_q, heads_q, D]: columns of g * out, of g
  float* dscale_exact;                       // [tile_count_k, heads_q, D]: columns of V * (P^T g), of the heads that need it
  void* scaled_grad;           // [rows of q, heads_q, head_dim]: scale * g, 16-bit
};

// Where a row of a tile stands in lse2 and delta: of every 16 rows, those of the accumulator columns that one thread holds (2 q,
// 2 q + 1, 8 + 2 q, 8 + 2 q + 1) follow each other, so that it reads them at once (read_columns).
SEAL_DEVICE int place_in_vector(int row) { return (row & ~15) | row % 8 / 2 * 4 | row / 8 % 2 * 2 | row % 2; }

// The values of a row vector in shared memory that belong to a thread's accumulator columns: of columns 8 j + 2 (lane % 4) + {0, 1}
// values[j].
template <int kPairs>
SEAL_DEVICE void read_columns(float2 (&values)[kPairs], const float* vector, uint32_t quad_lane) {
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) {
    const float4 four = *reinterpret_cast<const float4*>(vector + 8 * j + 4 * quad_lane);
    values[j] = make_float2(four.x, four.y);
    values[j + 1] = make_float2(four.z, four.w);
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
#pragma unroll 1
  for (int channel = threadIdx.x % 32; channel < (p.scale_channel_stride == 0 ? 1 : p.head_dim); channel += 32) {
    const float size = fabsf(scale[channel * p.scale_channel_stride]);
    unfit |= !(size >= low && size <= high);
  }
  return __any_sync(0xffffffffu, unfit);
}

struct BackwardMaps {
  CUtensorMap q, k, v;
  CUtensorMap grad_out, unscaled_grad_out;  // scale * g, and g, of the steps for an exact dscale; without a scale both are g
};

// ---- host

// The head_dim of the kernels that serve `head_dim`: the copy engine fills the channels beyond it with zeros.
constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
// Queries of a step of the main kernel.
constexpr int step_rows(int padded_head_dim) { return padded_head_dim == 64 ? 128 : 64; }
// Keys of a tile of the main kernel.
constexpr int key_rows(int padded_head_dim) { return padded_head_dim == 256 ? 64 : kTileRows; }

// All launches of one dtype and padded head_dim (backward_launch.cuh, instantiated in attention_backward_hd*.cu).
template <class T, int kD>
cudaError_t launch_backward(const BackwardKernelParams& p, cudaStream_t stream);

}  // namespace seal::sm90
