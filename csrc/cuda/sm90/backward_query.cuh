// dQ alone, without sums between thread blocks: one thread block owns kTileRows queries of one head and walks through the keys they
// see. With the kernel of keys it makes a backward without atomics: two products more than the five of the main kernel (S and dP are
// computed twice), but no fp32 dQ in memory and a fixed order of summation.
//
// Warpgroup 0 produces: one thread runs the copy engine. Warpgroups 1 and 2 consume, 64 queries each, and never wait for each other.
// A step, kBlockN keys:
//   S = Q K^T    dP = dO V^T    dQ += dS K
#pragma once

#include "backward_store.cuh"
#include "backward_tasks.cuh"

namespace seal::sm90 {

template <class T_, int kHeadDim_, Masking kMasking_>
struct QueryConfig {
  using T = T_;
  static constexpr Masking kMasking = kMasking_;
  static constexpr int kHeadDim = kHeadDim_;  // of the shared-memory tiles; the tensors' may be smaller
  static constexpr int kBlockM = kTileRows, kBlockN = 64;
  static constexpr int kKStages = 2, kVStages = kHeadDim == 256 ? 1 : 2;
  static constexpr int kWarpgroups = 2;  // consumers
  static constexpr int kThreads = 128 * (kWarpgroups + 1), kConsumerThreads = 128 * kWarpgroups, kConsumerWarps = 4 * kWarpgroups;
  // 65,536 registers: 24 + 2 * 240 for each of 128 lanes of a warpgroup.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kBytesQ = tile_bytes(kBlockM, kHeadDim), kBytesK = tile_bytes(kBlockN, kHeadDim);
};

// Who fills and who empties what; counts as in backward_config.cuh.
//
//   buffer               filled by                  read by                            count of full, empty
//   q, grad_out          warp 0 (copy engine)       the consumers                      1 and bytes, never emptied
//   k, v [stage]         warp 0 (copy engine)       the consumers, once a step: k      1 and bytes, kConsumerWarps
//                                                   last by the product dQ
template <class Config>
struct QueryShared {
  char q[Config::kBytesQ], grad_out[Config::kBytesQ];  // after the loop q .. v: the fp32 tile of the epilogue
  char k[Config::kKStages][Config::kBytesK], v[Config::kVStages][Config::kBytesK];
  QueryTask<Config::kBlockN, Config::kMasking> task;
  uint64_t q_full;
  uint64_t k_full[Config::kKStages], k_empty[Config::kKStages];
  uint64_t v_full[Config::kVStages], v_empty[Config::kVStages];
  static_assert(2 * Config::kBytesQ + (Config::kKStages + Config::kVStages) * Config::kBytesK >= Config::kBlockM * (Config::kHeadDim + kPad) * 4,
                "room for the epilogue's tile");

  static constexpr uint32_t kOffsetGradOut = Config::kBytesQ, kOffsetK = 2 * Config::kBytesQ;
  static constexpr uint32_t kOffsetV = kOffsetK + Config::kKStages * Config::kBytesK;

  // By one thread.
  SEAL_DEVICE void init_barriers() {
    barrier_init(&q_full, 1);
    barriers_init(k_full, 1);
    barriers_init(k_empty, Config::kConsumerWarps);
    barriers_init(v_full, 1);
    barriers_init(v_empty, Config::kConsumerWarps);
  }
};

// One thread of warp 0: Q and dO, then step by step K and V.
template <class Config>
SEAL_DEVICE void produce_query_operands(QueryShared<Config>& shared, const BackwardKernelParams& p, const BackwardMaps& maps, int present) {
  constexpr int kD = Config::kHeadDim, kM = Config::kBlockM, kN = Config::kBlockN;
  const auto& task = shared.task;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int head_k = task.head / (p.heads_q / p.heads_k);
  const uint64_t keep = policy_evict_last(), once = policy_evict_first();
  const RowCoordinates rows(packed, kM, task.first_query, task.seq.length_q, packed ? task.seq.first_q : task.batch_row);
  barrier_expect_bytes(&shared.q_full, 2 * present * kM * kSlabRowBytes);
  tma_load_tile<kM, kD>(shared.q, &maps.q, &shared.q_full, task.head, rows, once, present);
  tma_load_tile<kM, kD>(shared.grad_out, &maps.grad_out, &shared.q_full, task.head, rows, once, present);
  for (int n = task.begin, step = 0; n < task.end; ++n, ++step) {
    const RowCoordinates keys(packed, kN, task.place(n) * kN, task.seq.length_k, packed ? task.seq.first_k : task.batch_row);
    const int k = stage_of<Config::kKStages>(step), v = stage_of<Config::kVStages>(step);
    barrier_wait(&shared.k_empty[k], phase_of<Config::kKStages>(step) ^ 1);
    barrier_expect_bytes(&shared.k_full[k], present * kN * kSlabRowBytes);
    tma_load_tile<kN, kD>(shared.k[k], &maps.k, &shared.k_full[k], head_k, keys, keep, present);
    barrier_wait(&shared.v_empty[v], phase_of<Config::kVStages>(step) ^ 1);
    barrier_expect_bytes(&shared.v_full[v], present * kN * kSlabRowBytes);
    tma_load_tile<kN, kD>(shared.v[v], &maps.v, &shared.v_full[v], head_k, keys, keep, present);
  }
}

// One of the two consumer warpgroups, as a function: as members of a class ptxas serialises the products (C7511). A step, of the stages k and v:
//
//   waits for                 does                                              lets go of
//   v_full[v]                 issues dP = dO V^T; meanwhile P = exp2(S - lse)
//   dP                        dS = P (dP - delta), packed                       v_empty[v]
//   k_full of the next step   issues S of the next step and dQ += dS K
//   S, dQ                                                                       k_empty[k]
template <class Config>
SEAL_DEVICE void consume_keys(QueryShared<Config>& shared, uint32_t base, const BackwardKernelParams& p, uint32_t warp) {
  using T = typename Config::T;
  using Shared = QueryShared<Config>;
  constexpr int kD = Config::kHeadDim, kN = Config::kBlockN, kKStages = Config::kKStages, kVStages = Config::kVStages;
  const auto& task = shared.task;
  const uint32_t group = uniform_register(threadIdx.x) / 128 - 1;  // which 64 queries
  const int lane = threadIdx.x % 32;
  const int first_row = (warp - 4) * 16, row = first_row + lane / 4;  // of the query tile: the warp's; the thread's, and row + 8
  const auto keys_at = [&](int step) { return base + Shared::kOffsetK + stage_of<kKStages>(step) * Config::kBytesK; };
  const auto values_at = [&](int step) { return base + Shared::kOffsetV + stage_of<kVStages>(step) * Config::kBytesK; };
  const auto release = [&](uint64_t* empty) {
    if (lane == 0) barrier_arrive(empty);
  };
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
    const auto q_rows = Operand<Major::kK, Config::kBlockM>::at_uniform(base + group * 64 * kSlabRowBytes);
    const auto grad_rows = Operand<Major::kK, Config::kBlockM>::at_uniform(base + Shared::kOffsetGradOut + group * 64 * kSlabRowBytes);

    float s[kN / 2];
    barrier_wait(&shared.k_full[0], 0);
    wgmma_fence();
    lean_product<T, kD>(s, q_rows, Operand<Major::kK, kN>::at_uniform(keys_at(0)), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(s);
    for (int tile = begin, step = 0;; ++tile, ++step) {
      float dp[kN / 2], next_s[kN / 2];
      const int k = stage_of<kKStages>(step), v = stage_of<kVStages>(step);
      barrier_wait(&shared.v_full[v], phase_of<kVStages>(step));
      wgmma_fence();
      lean_product<T, kD>(dp, grad_rows, Operand<Major::kK, kN>::at_uniform(values_at(step)), false);
      wgmma_commit();
      if (tile < task.whole_begin || tile >= task.whole_end) task.mask(p, s, tile, row);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] = exp2_approx(s[i] * scale_log2 - lse2[i / 2 % 2]);
      wgmma_wait<0>();
      fence_registers(dp);
      release(&shared.v_empty[v]);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
      uint32_t ds[kN / 4];
      pack_fragment<T>(ds, s);
      // S of the next step; after the last one an old stage is multiplied to no purpose.
      const bool last = tile == end - 1;
      if (!last) barrier_wait(&shared.k_full[stage_of<kKStages>(step + 1)], phase_of<kKStages>(step + 1));
      wgmma_fence();
      lean_product<T, kD>(next_s, q_rows, Operand<Major::kK, kN>::at_uniform(keys_at(step + 1)), false);
      product<T, Major::kMN, kN>(dq, ds, Operand<Major::kMN, kN>::at_uniform(keys_at(step)), true);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(next_s);
      fence_registers(dq);
      release(&shared.k_empty[k]);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) s[i] = next_s[i];
      if (last) break;
    }
  }

  named_sync(kBarrierConsumers, Config::kConsumerThreads);  // both warpgroups are done with the tiles
  float* const staging = reinterpret_cast<float*>(shared.q) + first_row * (kD + kPad);
  stage_rows<kD, 2>(staging, dq, 0, lane);
  __syncwarp();
  const int first = task.first_query + first_row;
  store_rows<T, kD>(p, staging, min(16, task.seq.length_q - first), p.grad_q, task.seq.first_q + first, task.batch_row, p.seqlen_q, task.head,
                    p.heads_q, p.softmax_scale, p.cos != nullptr, p.positions_q);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_query(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = QueryShared<Config>;
  constexpr int kD = Config::kHeadDim;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  if (warp == 1) {
    const QueryTask<Config::kBlockN, Config::kMasking> task(p);
    if (threadIdx.x % 32 == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    shared.init_barriers();
    fence_barrier_init();
  }
  const int present = slabs(p.head_dim);
  zero_absent_slabs<Config::kBlockM, kD>(shared.q, 2, present, threadIdx.x, Config::kThreads);
  zero_absent_slabs<Config::kBlockN, kD>(shared.k, Config::kKStages + Config::kVStages, present, threadIdx.x, Config::kThreads);
  fence_proxy_async();
  __syncthreads();
  launch_dependents();
  wait_for_dependencies();
  const auto& task = shared.task;
  if (task.first_query >= task.seq.length_q) return;

  if (warp < 4) {
    registers_shrink<Config::kProducerRegisters>();
    if (warp != 0 || !elect_one() || task.end <= task.begin) return;
    produce_query_operands<Config>(shared, p, maps, present);
  } else {
    registers_grow<Config::kConsumerRegisters>();
    consume_keys<Config>(shared, base, p, warp);
  }
}

}  // namespace seal::sm90
