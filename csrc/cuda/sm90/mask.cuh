// The mask of the forward, the backward and decoding: which columns of its scores a row sees, which tiles a tile sees, which scores of
// a tile are masked. All that knows of windows, and of the ends of sequences inside a tile, is here.
#pragma once

#include "ptx.cuh"

namespace seal::sm90 {

// The mask between rows, queries or keys, and the columns of their scores, the other side: row r sees columns r + offset - before ..
// r + offset + after; -1: no limit on that side.
struct Band {
  int offset, before, after;
  int rows, columns;  // of the sequence
};

// Columns [begin, end); none where end <= begin.
struct Columns {
  int begin, end;
};

SEAL_DEVICE Columns columns_seen(const Band& band, int row) {
  const int center = row + band.offset;
  return {band.before < 0 ? 0 : max(0, center - band.before),
          band.after < 0 ? band.columns : min(band.columns - 1 - center, band.after) + center + 1};
}

enum class Side { kQueries, kKeys };

// The tiles of kColumns columns that a tile of kRows rows of side kOf sees. Queries past the end of their sequence need no mask:
// nothing is read of their rows, and their log-sum-exp is infinite. Keys past the end do.
template <Side kOf, int kRows, int kColumns>
struct SeenTiles {
  int begin, end;
  int full_begin, full_end;  // those of them in which nothing is masked

  // Returns the columns that some row sees.
  SEAL_DEVICE Columns find(const Band& band, int first_row) {
    const int last_row = min(first_row + kRows, band.rows) - 1;
    const Columns of_first = columns_seen(band, first_row), of_last = columns_seen(band, last_row);
    const bool any = last_row >= first_row && of_last.end > of_first.begin;
    begin = of_first.begin / kColumns;
    end = any ? (of_last.end - 1) / kColumns + 1 : begin;
    // Every row sees the columns from the last one's first to the first one's last.
    full_begin = (of_last.begin + kColumns - 1) / kColumns;
    if constexpr (kOf == Side::kQueries) {
      full_end = max(0, of_first.end) / kColumns;
    } else {
      full_end = band.after < 0 ? end : max(0, first_row + band.offset + band.after + 1) / kColumns;
      if (first_row + kRows > band.rows) full_end = full_begin;
    }
    return {of_first.begin, any ? of_last.end : of_first.begin};
  }
  SEAL_DEVICE bool full(int tile) const { return tile >= full_begin && tile < full_end; }
};

// Both of the following set masked scores to -inf, in accumulator order (wgmma.cuh): a thread holds two rows, 8 apart. They differ in
// what ptxas makes of them: the first one compares with constants; the second one, in the backward's loops, leaves the order of the
// instructions behind it as it was measured.

// Scores outside [left, right), which count from the thread's first column.
template <int kAcc>
SEAL_DEVICE void mask_scores(float (&scores)[kAcc], const int (&left)[2], const int (&right)[2]) {
#pragma unroll
  for (int i = 0; i < kAcc; ++i) {
    const int column = 8 * (i / 4) + i % 2, row = (i / 2) % 2;
    if (column < left[row] || column >= right[row]) scores[i] = -INFINITY;
  }
}

// Scores of the tile whose first column is `tile_column`; `row` is the thread's first row.
template <Side kOf, int kAcc>
SEAL_DEVICE void mask_tile(const Band& band, float (&scores)[kAcc], int tile_column, int row) {
  const int first_column = tile_column + threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int center = row + 8 * h + band.offset;
    int low = band.before < 0 ? INT32_MIN : center - band.before;
    int high = band.after < 0 ? INT32_MAX : center + band.after;
    if constexpr (kOf == Side::kQueries) {
      high = min(high, band.columns - 1);
    } else {
      if (row + 8 * h >= band.rows) low = INT32_MAX;
    }
#pragma unroll
    for (int j = 0; j < kAcc / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first_column + 8 * j + c;
        if (column < low || column > high) scores[4 * j + 2 * h + c] = -INFINITY;
      }
    }
  }
}

}  // namespace seal::sm90
