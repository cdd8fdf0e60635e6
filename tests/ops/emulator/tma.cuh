// Stands for csrc/cuda/sm90/tma.cuh where the kernels are compiled for the CPU: the same tile format, copies that land later.
#pragma once

#include "ptx.cuh"

struct CUtensorMap {
  const uint16_t* base;
  int64_t sizes[4], strides[4];  // columns, rows, heads, batch; elements
};

namespace seal::sm90 {

constexpr int kSlabColumns = 64, kSlabRowBytes = 128;
constexpr int slabs(int head_dim) { return (head_dim + kSlabColumns - 1) / kSlabColumns; }
constexpr int tile_bytes(int rows, int head_dim) { return slabs(head_dim) * rows * kSlabRowBytes; }
inline uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * kSlabRowBytes + ((chunk ^ (row & 7)) << 4); }

struct RowCoordinates {
  int row, batch;
  RowCoordinates(bool packed, int box_rows, int row_in_sequence, int length, int first) : row(row_in_sequence), batch(first) {
    if (!packed) return;
    const int remaining = max(0, min(length - row_in_sequence, box_rows));
    row = box_rows - remaining;
    batch = first + row_in_sequence + remaining;
  }
};

inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_last() { return 0; }

struct NoPolicy {};

template <int kRows, int kHeadDim, class Policy>
void tma_load_tile(void* shared, const CUtensorMap* map, uint64_t* barrier, int head, RowCoordinates at, Policy, int present) {
  for (int slab = 0; slab < present; ++slab) {
    auto* const to = static_cast<uint8_t*>(shared) + slab * kRows * kSlabRowBytes;
    if (smem_address(to) % 1024 != 0) emulator::fail("a tile at an address that is no multiple of 1024");
    const int64_t from[4] = {slab * kSlabColumns, at.row, head, at.batch};
    for (int d = 0; d < 4; ++d) {
      if (from[d] < 0 || from[d] >= map->sizes[d]) emulator::fail("a box without a row or a column of the tensor");
    }
    memset(to, 0xff, kRows * kSlabRowBytes);
    const auto land = [=] {
      for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kSlabColumns; ++column) {
          const int64_t x = from[0] + column, y = from[1] + row;
          const bool inside = x < map->sizes[0] && y < map->sizes[1];
          const uint16_t value = inside ? map->base[x + y * map->strides[1] + from[2] * map->strides[2] + from[3] * map->strides[3]] : 0;
          memcpy(to + swizzled(row, column / 8) + 2 * (column % 8), &value, 2);
        }
      }
      emulator::Barrier& b = emulator::barrier(barrier);
      b.bytes -= kRows * kSlabRowBytes;
      emulator::complete_phase(b);
    };
    emulator::copies.push_back({land, static_cast<int>(emulator::random() % (emulator::random() % 4 == 0 ? 400 : 20))});
  }
}

}  // namespace seal::sm90
