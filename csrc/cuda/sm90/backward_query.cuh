// dQ alone, without sums between thread blocks: one thread block owns kTileRows queries of one head and walks through the keys they see.
// With the key/value kernel it makes the deterministic backward: two products more than the five of the main kernel (S and
// dP are computed twice), but no fp32 dQ in memory, no atomics and a fixed order of summation.
//
// Warpgroup 0 produces K and V; warpgroups 1 and 2 consume, 64 queries each, and never wait for each other. A step, kN keys:
//   S = Q K^T    dP = dO V^T    dQ += dS K
#pragma once

#include "backward_store.cuh"
#include "backward_tasks.cuh"

namespace seal::sm90 {

template <int kD, int kN, Masking kMasking>
struct QueryShared {
  static constexpr int kThreads = 384, kConsumerThreads = 256, kConsumerWarps = 8;
  static constexpr int kStagesK = 2, kStagesV = kD == 256 ? 1 : 2;
  static constexpr int kBytesQ = tile_bytes(kTileRows, kD), kBytesK = tile_bytes(kN, kD);
  char q[kBytesQ], grad_out[kBytesQ];  // after the loop q .. v: the fp32 tile of the epilogue
  char k[kStagesK][kBytesK], v[kStagesV][kBytesK];
  QueryTask<kN, kMasking> task;
  uint64_t q_full;
  uint64_t k_full[kStagesK], k_empty[kStagesK];
  uint64_t v_full[kStagesV], v_empty[kStagesV];
  static_assert(2 * kBytesQ + (kStagesK + kStagesV) * kBytesK >= kTileRows * (kD + kPad) * 4, "room for the epilogue's tile");
};

template <class T, int kD, int kN, Masking kMasking>
__global__ void __launch_bounds__(QueryShared<kD, kN, kMasking>::kThreads, 1)
    attention_backward_query(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = QueryShared<kD, kN, kMasking>;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == 1) {
    const QueryTask<kN, kMasking> task(p);
    if (lane == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    const auto init = [](uint64_t* barriers, int count, int arrivals) {
      for (int i = 0; i < count; ++i) barrier_init(barriers + i, arrivals);
    };
    init(&shared.q_full, 1, 1);
    init(shared.k_full, Shared::kStagesK, 1);
    init(shared.k_empty, Shared::kStagesK, Shared::kConsumerWarps);
    init(shared.v_full, Shared::kStagesV, 1);
    init(shared.v_empty, Shared::kStagesV, Shared::kConsumerWarps);
    fence_barrier_init();
  }
  const int present = slabs(p.head_dim);
  zero_absent_slabs<kTileRows, kD>(shared.q, 2, present, threadIdx.x, Shared::kThreads);
  zero_absent_slabs<kN, kD>(shared.k, Shared::kStagesK + Shared::kStagesV, present, threadIdx.x, Shared::kThreads);
  fence_proxy_async();
  __syncthreads();
  launch_dependents();
  wait_for_dependencies();
  const QueryTask<kN, kMasking>& task = shared.task;
  if (task.first_query >= task.seq.length_q) return;

  if (warp < 4) {
    // ================ the supplying side ================
    registers_shrink<24>();
    if (warp != 0 || !elect_one() || task.end <= task.begin) return;
    const bool packed = p.cu_seqlens_q != nullptr;
    const int head_k = task.head / (p.heads_q / p.heads_k);
    const uint64_t keep = policy_evict_last(), stream = policy_evict_first();
    const RowCoordinates rows(packed, kTileRows, task.first_query, task.seq.length_q, packed ? task.seq.first_q : task.batch_row);
    barrier_expect_bytes(&shared.q_full, 2 * present * kTileRows * kSlabRowBytes);
    tma_load_tile<kTileRows, kD>(shared.q, &maps.q, &shared.q_full, task.head, rows, stream, present);
    tma_load_tile<kTileRows, kD>(shared.grad_out, &maps.grad_out, &shared.q_full, task.head, rows, stream, present);
    for (int n = task.begin, step = 0; n < task.end; ++n, ++step) {
      const RowCoordinates keys(packed, kN, task.place(n) * kN, task.seq.length_k, packed ? task.seq.first_k : task.batch_row);
      const int k = stage_of<Shared::kStagesK>(step), v = stage_of<Shared::kStagesV>(step);
      barrier_wait(&shared.k_empty[k], phase_of<Shared::kStagesK>(step) ^ 1);
      barrier_expect_bytes(&shared.k_full[k], present * kN * kSlabRowBytes);
      tma_load_tile<kN, kD>(shared.k[k], &maps.k, &shared.k_full[k], head_k, keys, keep, present);
      barrier_wait(&shared.v_empty[v], phase_of<Shared::kStagesV>(step) ^ 1);
      barrier_expect_bytes(&shared.v_full[v], present * kN * kSlabRowBytes);
      tma_load_tile<kN, kD>(shared.v[v], &maps.v, &shared.v_full[v], head_k, keys, keep, present);
    }
    return;
  }

  // ================ the computing side ================
  registers_grow<240>();
  const uint32_t group = uniform_register(threadIdx.x) / 128 - 1;
  const int first_row = (warp - 4) * 16, row = first_row + lane / 4;  // of the query tile; and row + 8
  float dq[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) dq[i] = 0.f;

  if (task.end > task.begin) {
    const float scale_log2 = p.softmax_scale * kLog2e;
    float lse2[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = task.head * p.padded_rows_q + task.seq.padded_q + task.first_query + place_in_vector(row + 8 * h);
      lse2[h] = p.lse2[at];
      delta[h] = p.delta[at];
    }
    barrier_wait(&shared.q_full, 0);
    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    const auto q_rows = Operand<Major::kK, kTileRows>::at_uniform(base + group * 64 * kSlabRowBytes);
    const auto grad_rows = Operand<Major::kK, kTileRows>::at_uniform(base + Shared::kBytesQ + group * 64 * kSlabRowBytes);
    const auto k_at = [&](int step) { return base + 2 * Shared::kBytesQ + stage_of<Shared::kStagesK>(step) * Shared::kBytesK; };
    const auto v_at = [&](int step) {
      return base + 2 * Shared::kBytesQ + (Shared::kStagesK + stage_of<Shared::kStagesV>(step)) * Shared::kBytesK;
    };

    float s[kN / 2];
    barrier_wait(&shared.k_full[0], 0);
    wgmma_fence();
    lean_product<T, kD>(s, q_rows, Operand<Major::kK, kN>::at_uniform(k_at(0)), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(s);
    for (int n = begin, step = 0;; ++n, ++step) {
      float dp[kN / 2], next_s[kN / 2];
      const int k = stage_of<Shared::kStagesK>(step), v = stage_of<Shared::kStagesV>(step);
      barrier_wait(&shared.v_full[v], phase_of<Shared::kStagesV>(step));
      wgmma_fence();
      lean_product<T, kD>(dp, grad_rows, Operand<Major::kK, kN>::at_uniform(v_at(step)), false);
      wgmma_commit();
      if (n < task.whole_begin || n >= task.whole_end) task.mask(p, s, n, row);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] = exp2_approx(s[i] * scale_log2 - lse2[i / 2 % 2]);
      wgmma_wait<0>();
      fence_registers(dp);
      if (lane == 0) barrier_arrive(&shared.v_empty[v]);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
      uint32_t ds[kN / 4];
      pack_fragment<T>(ds, s);
      // S of the next step; after the last one an old stage is multiplied to no purpose.
      const bool last = n == end - 1;
      if (!last) barrier_wait(&shared.k_full[stage_of<Shared::kStagesK>(step + 1)], phase_of<Shared::kStagesK>(step + 1));
      wgmma_fence();
      lean_product<T, kD>(next_s, q_rows, Operand<Major::kK, kN>::at_uniform(k_at(step + 1)), false);
      product<T, Major::kMN, kN>(dq, ds, Operand<Major::kMN, kN>::at_uniform(k_at(step)), true);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(next_s);
      fence_registers(dq);
      if (lane == 0) barrier_arrive(&shared.k_empty[k]);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] = next_s[i];
      if (last) break;
    }
  }

  // ================ epilogue ================
  named_sync(kBarrierConsumers, Shared::kConsumerThreads);  // both warpgroups are done with the tiles
  float* const tile = reinterpret_cast<float*>(shared.q) + first_row * (kD + kPad);
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* const at = tile + (lane / 4 + 8 * h) * (kD + kPad) + 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = make_float2(dq[4 * j + 2 * h], dq[4 * j + 2 * h + 1]);
    }
  }
  __syncwarp();
  store_rows<T, kD>(p, tile, min(16, task.seq.length_q - task.first_query - first_row), p.grad_q, task.seq.first_q + task.first_query + first_row,
                    task.batch_row, p.seqlen_q, task.head, p.heads_q, p.softmax_scale, p.cos != nullptr, p.positions_q);
}

}  // namespace seal::sm90
