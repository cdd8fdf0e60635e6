// The mask of the forward and the backward: which tiles a tile sees, and which scores of a tile are masked. All that knows of
// windows and of the ends of sequences inside a tile is here.
#pragma once

#include "ptx.cuh"

namespace seal::sm90 {

// The mask between the rows of a tile, queries or keys, and the columns of its score tiles, the other side: row r sees columns
// r + offset - before .. r + offset + after; -1: no limit on that side.
struct Band {
  int offset, before, after;
  int rows, columns;  // of the sequence
};

// The first column that row `row` sees, whether or not there is one.
SEAL_DEVICE int first_column_seen(const Band& band, int row) { return band.before < 0 ? 0 : max(0, row + band.offset - band.before); }

enum class Side { kQueries, kKeys };

// The tiles of kColumns columns that a tile of kRows rows of side kOf sees. Queries past the end of their sequence need no mask:
// their log-sum-exp is infinite. Keys past the end do.
template <Side kOf, int kRows, int kColumns>
struct SeenTiles {
  int begin, end;
  int full_begin, full_end;  // those of them in which nothing is masked

  SEAL_DEVICE void find(const Band& band, int first_row) {
    const int last_row = min(first_row + kRows, band.rows) - 1;
    const int first = first_column_seen(band, first_row);
    const int last = band.after < 0 ? band.columns - 1 : min(band.columns - 1, last_row + band.offset + band.after);
    begin = first / kColumns;
    end = last_row < first_row || last < first ? begin : last / kColumns + 1;
    // Every row sees the columns from last_row + offset - before to first_row + offset + after.
    full_begin = band.before < 0 ? begin : (max(0, last_row + band.offset - band.before) + kColumns - 1) / kColumns;
    const int seen_by_all = max(0, first_row + band.offset + band.after + 1);
    if constexpr (kOf == Side::kQueries) {
      full_end = (band.after < 0 ? band.columns : min(band.columns, seen_by_all)) / kColumns;
    } else {
      full_end = band.after < 0 ? end : seen_by_all / kColumns;
      if (first_row + kRows > band.rows) full_end = full_begin;
    }
  }

  // Sets the scores of tile `tile` to -inf where masked; `row` is the thread's first row of the accumulator.
  static SEAL_DEVICE void mask(const Band& band, float (&scores)[kColumns / 2], int tile, int row) {
    const int first_column = tile * kColumns + threadIdx.x % 4 * 2;
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
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = first_column + 8 * j + c;
          if (column < low || column > high) scores[4 * j + 2 * h + c] = -INFINITY;
        }
      }
    }
  }
};

}  // namespace seal::sm90
