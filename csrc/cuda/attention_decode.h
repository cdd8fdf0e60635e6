// Attention forward for few queries over many keys (decoding) on sm_90a: the keys are split over thread blocks. Same contract
// as attention.h, whose parameters it takes; no framework header.
#pragma once

#include "attention.h"

namespace seal {

// How a call is cut up: a pure function of shapes, mask and device, so that equal calls give equal bits.
struct AttentionDecodePlan {
  int32_t row_tiles;        // 16-row tiles of packed queries (a KV head's group of heads times the queries) in a thread block
  int32_t row_blocks;       // thread blocks over those rows; a sequence with more rows than expected takes several turns
  int32_t splits;           // parts of the keys; 1: no workspace, no second kernel
  int64_t workspace_bytes;  // fp32 partial results and their log-sum-exp, 16-byte aligned
};

// Whether the decode kernel is the better one: few queries, and several times as many keys. `max_length_q`: a bound on the queries of a
// sequence (dense: their number). Nothing depends on its truth but speed.
bool prefers_attention_decode(const AttentionForwardParams& params, int64_t max_length_q);

// `splits` > 0 forces that many (tests); 0: chosen so that the current device is filled.
cudaError_t plan_attention_decode(const AttentionForwardParams& params, int64_t max_length_q, int32_t splits, AttentionDecodePlan* plan);

// Launches on the current device: the split kernel and, with more than one split, the one that combines.
cudaError_t launch_attention_decode(const AttentionForwardParams& params, const AttentionDecodePlan& plan, void* workspace,
                                    cudaStream_t stream);

}  // namespace seal
