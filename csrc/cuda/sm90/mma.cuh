// Warp-wide matrix products (mma.sync m16n8k16) and the loads that feed them from tiles in shared memory (tma.cuh's format).
//
// Accumulator of lane l: acc[4 j + 2 h + c] is row l / 4 + 8 h, column 8 j + 2 (l % 4) + c, as a warp's part of a wgmma accumulator:
// softmax.cuh and pack_fragment serve both.
#pragma once

#include "tma.cuh"

namespace seal::sm90 {

// c[4] += a (16 x 16) b (16 x 8).
template <class T>
SEAL_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8x8 matrices, each transposed on the way.
SEAL_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Addresses of a tile of kRows rows for ldmatrix: this lane's row and 16-byte chunk of one 16 x 16 piece, by what the piece becomes.
// at(step): the piece 16 columns * step further on. Pieces start at rows that are multiples of 8, so the swizzle depends on the lane alone.
template <int kRows>
struct Pieces {
  uint32_t row_address, chunk, swizzle;

  SEAL_DEVICE Pieces(uint32_t tile, uint32_t first_row, uint32_t row, uint32_t chunk)
      : row_address(tile + (first_row + row) * kSlabRowBytes), chunk(chunk), swizzle(row & 7) {}

  SEAL_DEVICE uint32_t at(int step) const {
    return row_address + (step / 4) * (kRows * kSlabRowBytes) + ((((step % 4) * 2 + chunk) ^ swizzle) << 4);
  }
};

// A operand (rows x k): registers 0..3 are one fragment.
template <int kRows>
SEAL_DEVICE Pieces<kRows> pieces_a(uint32_t tile, uint32_t first_row, uint32_t lane) {
  return {tile, first_row, lane % 16, lane / 16};
}
// B operand, stored n x k (keys x channels, as K is): registers 0, 1 are columns 0..7, registers 2, 3 columns 8..15.
template <int kRows>
SEAL_DEVICE Pieces<kRows> pieces_b(uint32_t tile, uint32_t first_row, uint32_t lane) {
  return {tile, first_row, lane / 16 * 8 + lane % 8, lane / 8 % 2};
}
// B operand, stored k x n (keys x channels, as V is); with ldmatrix_transposed, registers as above.
template <int kRows>
SEAL_DEVICE Pieces<kRows> pieces_b_transposed(uint32_t tile, uint32_t first_row, uint32_t lane) {
  return {tile, first_row, lane % 16, lane / 16};
}

}  // namespace seal::sm90
