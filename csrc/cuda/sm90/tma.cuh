// Tensor copies (TMA): the shared-memory tile format, the device instructions, and the host function that makes maps.
//
// Tile format. A tile of R rows x D columns of 16-bit elements lies in shared memory as D/64 slabs of 64 columns, slab
// after slab; a slab is R rows of 128 bytes with the 128-byte swizzle (16-byte chunk c of row r lies at chunk c ^ (r % 8)).
// Tiles start at multiples of 1024 bytes and R is a multiple of 8. One TMA box is one slab: 64 columns x box_rows.
//
// Coordinates are (column, row, head, batch), for dense [B, S, H, D] and packed [T, H, D] tensors alike. In the dense map
// rows end at S, so hardware zero-fills loads and drops stores past the sequence end. A packed sequence may end anywhere:
// there the "row" dimension has only box_rows entries, the "batch" dimension steps by single rows too, and the map's base
// lies box_rows rows before the tensor. Starting at row `box_rows - remaining` of that dimension, exactly `remaining` rows
// are in bounds; RowCoordinates compensates for the shift. So no kernel ever reads or writes past the end of a sequence.
// A box must hold a row and a column: of one wholly outside, the hardware touches an address that may not be mapped.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace seal::sm90 {

constexpr int kSlabColumns = 64;
constexpr int kSlabRowBytes = 128;

__host__ __device__ constexpr int slabs(int head_dim) { return (head_dim + kSlabColumns - 1) / kSlabColumns; }
__host__ __device__ constexpr int tile_bytes(int rows, int head_dim) { return slabs(head_dim) * rows * kSlabRowBytes; }

// Byte offset of the 16-byte chunk `chunk` (0..7) of row `row` inside a slab.
SEAL_DEVICE uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * kSlabRowBytes + ((chunk ^ (row & 7)) << 4); }

// The last two coordinates of a box that starts `row` rows into a sequence.
struct RowCoordinates {
  int row, batch;

  // Dense: `first` is the batch row. Packed: `first` is the sequence's first row in the packed tensor, `length` its length.
  SEAL_DEVICE RowCoordinates(bool packed, int box_rows, int row_in_sequence, int length, int first) {
    if (packed) {
      const int remaining = max(0, min(length - row_in_sequence, box_rows));
      row = box_rows - remaining;
      batch = first + row_in_sequence + remaining;
    } else {
      row = row_in_sequence;
      batch = first;
    }
  }
};

SEAL_DEVICE void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// L2 eviction priorities for loads.
SEAL_DEVICE uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
SEAL_DEVICE uint64_t policy_evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One slab into shared memory; completes on `barrier`, which counts box_rows * 128 bytes. From one thread.
SEAL_DEVICE void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int column, int head, RowCoordinates at,
                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(shared)),
      "l"(map), "r"(smem_address(barrier)), "r"(column), "r"(at.row), "r"(head), "r"(at.batch), "l"(policy)
      : "memory");
}

// The same where L2 is told nothing, which is not what a policy of evict_normal says: where bytes decide, that took a sixth
// longer on an H200, and evict_first 2 to 5 % (docs/kernel_notes_decode.md).
struct NoPolicy {};
SEAL_DEVICE void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int column, int head, RowCoordinates at, NoPolicy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          smem_address(shared)),
      "l"(map), "r"(smem_address(barrier)), "r"(column), "r"(at.row), "r"(head), "r"(at.batch)
      : "memory");
}

// A whole tile of kRows x kHeadDim, slab by slab: its first `present` slabs. Those beyond the tensor's last column, boxes without
// a column, are not loaded; zero_absent_slabs fills them.
template <int kRows, int kHeadDim, class Policy>
SEAL_DEVICE void tma_load_tile(void* shared, const CUtensorMap* map, uint64_t* barrier, int head, RowCoordinates at, Policy policy,
                               int present = slabs(kHeadDim)) {
#pragma unroll
  for (int slab = 0; slab < slabs(kHeadDim); ++slab) {
    if (slab < present) tma_load(static_cast<char*>(shared) + slab * kRows * kSlabRowBytes, map, barrier, slab * kSlabColumns, head, at, policy);
  }
}

// Zeros in the slabs of `tiles` consecutive tiles from `present` on. By `threads` threads, this one the `thread`th; then
// fence_proxy_async and a barrier.
template <int kRows, int kHeadDim>
SEAL_DEVICE void zero_absent_slabs(void* shared, int tiles, int present, int thread, int threads) {
  constexpr int kSlabBytes = kRows * kSlabRowBytes;
  for (int tile = 0; tile < tiles; ++tile) {
    char* const first = static_cast<char*>(shared) + tile * tile_bytes(kRows, kHeadDim);
    for (int at = present * kSlabBytes + thread * 16; at < slabs(kHeadDim) * kSlabBytes; at += threads * 16) {
      *reinterpret_cast<uint4*>(first + at) = make_uint4(0, 0, 0, 0);
    }
  }
}

// One slab from shared memory (fence_proxy_async and a barrier of the writers before); then bulk_commit and bulk_wait*.
SEAL_DEVICE void tma_store(const CUtensorMap* map, const void* shared, int column, int head, RowCoordinates at) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(smem_address(shared)), "r"(column), "r"(at.row), "r"(head), "r"(at.batch)
               : "memory");
}

// What a map is made of. Strides in elements; the last dimension has stride 1. rows = S (dense) or T (packed).
struct TileSource {
  const void* data;
  int64_t batch, rows, heads, head_dim;
  int64_t batch_stride, row_stride, head_stride;
};

// True if a map can be made of the tensor as it is: 16-byte aligned data and strides.
inline bool tma_ready(const TileSource& t) {
  const auto aligned = [](int64_t stride, int64_t size) { return size <= 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.head_dim % 8 == 0 && aligned(t.row_stride, t.rows) &&
         aligned(t.head_stride, t.heads) && aligned(t.batch_stride, t.batch);
}

// Fills `map` for boxes of box_rows rows x 64 columns (bf16, or fp16 if `half`); what misses the L2 cache is fetched in pieces of
// `promotion`. The driver's function is looked up at
// run time, so that nothing links against libcuda.
inline cudaError_t make_tile_map(CUtensorMap* map, const TileSource& t, bool half, bool packed, int box_rows,
                                 CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;

  constexpr int64_t kElementBytes = 2;
  const auto bytes = [](int64_t stride, int64_t size) { return static_cast<cuuint64_t>(size > 1 ? stride * kElementBytes : 16); };
  const cuuint64_t row_bytes = bytes(t.row_stride, t.rows);
  const auto base = reinterpret_cast<uintptr_t>(t.data) - (packed ? box_rows * row_bytes : 0);
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.head_dim), static_cast<cuuint64_t>(packed ? box_rows : t.rows),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(packed ? t.rows + 1 : t.batch)};
  const cuuint64_t strides[3] = {row_bytes, bytes(t.head_stride, t.heads), packed ? row_bytes : bytes(t.batch_stride, t.batch)};
  const cuuint32_t box[4] = {kSlabColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, reinterpret_cast<void*>(base), sizes,
             strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace seal::sm90
