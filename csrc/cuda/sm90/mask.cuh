// Sets the scores of a tile to -inf where masked (../mask.h says where that is). Thread layout as in wgmma.cuh: a thread holds two rows,
// l / 4 and l / 4 + 8 of its warp's 16, and of each tile the columns 8 j + 2 (l % 4) + {0, 1}.
#pragma once

#include "../mask.h"
#include "ptx.cuh"

namespace seal::sm90 {

// Rows are queries. Left are the keys that are seen, and with kSinks those before sink_end; keys count from the thread's first
// column.
template <bool kSinks, int kAcc>
SEAL_DEVICE void mask_scores(float (&scores)[kAcc], const Span (&seen)[2], const int (&sink_end)[2]) {
#pragma unroll
  for (int i = 0; i < kAcc; ++i) {
    const int column = 8 * (i / 4) + i % 2, row = (i / 2) % 2;
    const bool outside = column < seen[row].begin || column >= seen[row].end;
    if (outside && !(kSinks && column < sink_end[row])) scores[i] = -INFINITY;
  }
}

// The same for one of the two rows: the bounds of both need not be there at a time.
template <bool kSinks, int kAcc>
SEAL_DEVICE void mask_row(float (&scores)[kAcc], int row, Span seen, int sink_end) {
#pragma unroll
  for (int i = 0; i < kAcc / 2; ++i) {
    const int column = 8 * (i / 2) + i % 2;
    const bool outside = column < seen.begin || column >= seen.end;
    if (outside && !(kSinks && column < sink_end)) scores[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
  }
}

// Rows are keys. Left are the queries that see them, and with kSinks those from sink_begin on.
template <bool kSinks, int kAcc>
SEAL_DEVICE void mask_transposed(float (&scores)[kAcc], const Span (&seen)[2], const int (&sink_begin)[2]) {
#pragma unroll
  for (int i = 0; i < kAcc; ++i) {
    const int column = 8 * (i / 4) + i % 2, row = (i / 2) % 2;
    const bool outside = column < seen[row].begin || column >= seen[row].end;
    if (outside && !(kSinks && column >= sink_begin[row])) scores[i] = -INFINITY;
  }
}

}  // namespace seal::sm90
