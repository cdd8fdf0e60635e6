// What the two kernels of the attention backward that own keys share, the main one (backward_kernel.cuh) and that for a head_dim
// above 128 (backward_wide.cuh): the order of the query tiles, the loads of a step, the exponentials, the exact dscale.
#pragma once

#include "backward_tasks.cuh"

namespace seal::sm90 {

// What is to be produced: dQ, dK and dV; dK and dV; dV; nothing but dscale of the heads that needs_exact_dscale() names (which
// the other launches produce as well, where it is wanted).
enum class BackwardWork { kAll, kKeyValue, kValue, kScale };

// Query tiles from the last to the first: under the causal mask the thread blocks of a head then read and add to the same rows at
// about the same time, which keeps them in L2 (hd128, 32k: 37.3 ms instead of 38.5). At head_dim 64 the other order is faster.
template <int kD>
constexpr bool kDescending = kD == 128;
// The query tile in place `place` of [begin, end) in the order of work.
template <int kD>
SEAL_DEVICE int query_tile(int begin, int end, int place) {
  return kDescending<kD> ? begin + end - 1 - place : place;
}

// ---- the producing side

// Where the keys of a task lie.
template <class Config, class Task>
SEAL_DEVICE RowCoordinates key_coordinates(const BackwardKernelParams& p, const Task& task) {
  const bool packed = p.cu_seqlens_k != nullptr;
  return RowCoordinates(packed, Config::kBlockN, task.first_key, task.seq.length_k, packed ? task.seq.first_k : task.batch_row);
}

// K or V of a task. present: see tma_load_tile().
template <class Config>
SEAL_DEVICE void load_keys(char* to, const CUtensorMap* map, uint64_t* full, int head_k, RowCoordinates keys, uint64_t policy, int present) {
  barrier_expect_bytes(full, present * Config::kBlockN * kSlabRowBytes);
  tma_load_tile<Config::kBlockN, Config::kHeadDim>(to, map, full, head_k, keys, policy, present);
}

// Q with lse2, then dO with delta, of query tile `tile` of a head, as step `step` of the ring.
template <class Config, class Shared, class Task>
SEAL_DEVICE void load_step(Shared& shared, const BackwardKernelParams& p, const CUtensorMap* q, const CUtensorMap* grad_out, const Task& task,
                           int step, int head, int tile, uint64_t policy, int present) {
  constexpr int kM = Config::kBlockM;
  const bool packed = p.cu_seqlens_k != nullptr;
  const int stage = stage_of<Config::kStages>(step);
  const RowCoordinates rows(packed, kM, tile * kM, task.seq.length_q, packed ? task.seq.first_q : task.batch_row);
  const auto first_row = [&] { return head * p.padded_rows_q + task.seq.padded_q + tile * kM; };
  [[maybe_unused]] const int64_t ahead = Config::kRowAhead ? first_row() : 0;
  const auto load = [&](char* to, float* to_vector, const CUtensorMap* map, const float* vector, uint64_t* full, uint64_t* empty) {
    barrier_wait(empty, phase_of<Config::kStages>(step) ^ 1);
    barrier_expect_bytes(full, present * kM * kSlabRowBytes + kM * 4);
    tma_load_tile<kM, Config::kHeadDim>(to, map, full, head, rows, policy, present);
    bulk_load(to_vector, vector + (Config::kRowAhead ? ahead : first_row()), kM * 4, full);
  };
  load(shared.q[stage], shared.lse2[stage], q, p.lse2, &shared.q_full[stage], &shared.q_empty[stage]);
  load(shared.grad_out[stage], shared.delta[stage], grad_out, p.delta, &shared.do_full[stage], &shared.do_empty[stage]);
}

// ---- the consuming side

// Scores to probabilities, P^T = exp2(S^T * scale_log2 - lse2) with lse2 of the columns (read_columns).
template <int kScores>
SEAL_DEVICE void exponentiate(float (&s)[kScores], const float2 (&lse2)[kScores / 4], float scale_log2) {
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[4 * j + i] = exp2_approx(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse2[j].x : lse2[j].y));
  }
}

// dscale of one head from one tile of kRows keys: the columns of V * (P^T g), summed over the rows, by the kWarps warps from
// thread 128 on, which hold 16 rows each. `v`: the tile in shared memory; `scratch`: kWarps * kD floats there; `barrier`: of those
// warps.
template <class T, int kD, int kRows, int kWarps>
SEAL_DEVICE void sum_columns(const BackwardKernelParams& p, const char* v, float* scratch, int64_t tile, int head, const float (&dv)[kD / 2],
                             uint32_t barrier) {
  const uint32_t thread = threadIdx.x - 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const auto v_at = [&](int j, int h) {
    return unpack<T>(*reinterpret_cast<const uint32_t*>(v + j / 8 * (kRows * kSlabRowBytes) + swizzled(row + 8 * h, j % 8) + column * 2));
  };
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
    const float2 v0 = v_at(j, 0), v1 = v_at(j, 1);
    float x = v0.x * dv[4 * j] + v1.x * dv[4 * j + 2], y = v0.y * dv[4 * j + 1] + v1.y * dv[4 * j + 3];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, step);
      y += __shfl_xor_sync(0xffffffffu, y, step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(scratch + thread / 32 * kD + 8 * j + column) = make_float2(x, y);
  }
  named_sync(barrier, 32 * kWarps);
#pragma unroll 1
  for (int c = thread; c < kD; c += 32 * kWarps) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kD + c];
    p.dscale_exact[(tile * p.heads_q + head) * kD + c] = sum;
  }
  named_sync(barrier, 32 * kWarps);  // nobody still reads the sums
}

// The exact dscale of a task that no query sees: nothing. By `threads` threads, this one the `thread`th.
template <int kD, class Task>
SEAL_DEVICE void clear_exact_dscale(const BackwardKernelParams& p, const Task& task, int thread, int threads) {
  for (uint64_t rest = task.exact; rest != 0; rest &= rest - 1) {
    const int head = task.first_head + __ffsll(rest) - 1;
#pragma unroll 1
    for (int c = thread; c < kD; c += threads) p.dscale_exact[(task.tile * p.heads_q + head) * kD + c] = 0.f;
  }
}

}  // namespace seal::sm90
