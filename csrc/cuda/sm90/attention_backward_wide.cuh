// dK and dV for head_dim up to 256: one CTA owns 64 keys of one key/value head. The accumulators of dK and dV fill a
// warpgroup each, so the warpgroups divide the work by product instead of by keys:
//   warpgroup 1:  S^T = K Q^T, P, dV += P^T dO
//   warpgroup 2:  dP^T = V dO^T, dS, dK += dS^T Q
// P goes from the first to the second through shared memory. While one takes exponentials or makes dS, the other's products
// keep the tensor cores busy. dQ comes from attention_backward_query.cuh: with only 64 keys a tile, adding dQ up in memory
// costs as much as computing S and dP twice (measured: the same time), and is not deterministic. Heads whose dscale must be
// exact are walked through once more after the epilogue, as in attention_backward_main.cuh, by the first warpgroup.
#pragma once

#include "attention_backward_main.cuh"

namespace seal::sm90 {

struct WideShared {
  static constexpr int kD = 256, kM = 64, kRows = 64, kStages = 2;
  static constexpr int kBytes = tile_bytes(64, kD);  // of any tile
  char k[kBytes], v[kBytes];
  char q[kStages][kBytes], grad_out[kStages][kBytes];
  uint4 p[2][4][128];                 // P of a step in accumulator order; after the loop q .. p: the epilogue's fp32 tiles
  BackwardTask<kM, kRows> task;
  alignas(16) float lse2[kStages][kM], delta[kStages][kM];  // filled by bulk copies
  float column_sums[4][kD];
  uint64_t exact_known, k_full, v_full, stages_free, q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages], p_full[2], p_empty[2];
  static_assert(2 * kStages * kBytes + sizeof(p) >= 2 * kRows * (kD + kPad) * 4, "room for the epilogue's tiles");
};

template <class T, BackwardWork kWork>
__global__ void __launch_bounds__(384, 1)
    attention_backward_wide(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = WideShared;
  constexpr int kD = Shared::kD, kM = Shared::kM, kRows = Shared::kRows, kStages = Shared::kStages;
  constexpr bool kKeys = kWork != BackwardWork::kValue && kWork != BackwardWork::kScale;  // warpgroup 2 has work
  constexpr int kReaders = kKeys ? 8 : 4;                 // warps that release a stage
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == 1) {
    BackwardTask<kM, kRows> task;
    task.find(p, blockIdx.x, true);
    if constexpr (!kLateExact) task.find_exact_heads(p, true);
    if (lane == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    if constexpr (kLateExact) {
      prefetch_map(&maps.k);
      prefetch_map(&maps.q);
      prefetch_map(&maps.v);
      prefetch_map(&maps.grad_out);
      barrier_init(&shared.exact_known, 1);
    }
    barrier_init(&shared.k_full, 1);
    barrier_init(&shared.v_full, 1);
    barrier_init(&shared.stages_free, 8);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], kReaders);
      barrier_init(&shared.do_full[i], 1), barrier_init(&shared.do_empty[i], kReaders);
      barrier_init(&shared.p_full[i], 4), barrier_init(&shared.p_empty[i], 4);
    }
    fence_barrier_init();
  }
  const int present = slabs(p.head_dim);
  zero_absent_slabs<64, kD>(shared.k, 2 + 2 * kStages, present, threadIdx.x, 384);
  fence_proxy_async();
  __syncthreads();
  if constexpr (kPdl) {
    release_dependents();
  } else {
    wait_for_dependencies();
  }
  const BackwardTask<kM, kRows>& task = shared.task;
  const int steps = kWork == BackwardWork::kScale ? 0 : (task.end - task.begin) * p.heads_per_cta;
  int exact_steps = kLateExact ? 0 : task.exact_steps();

  if (warp < 4) {
    // ================ producers ================
    registers_shrink<24>();
    if constexpr (kLateExact) {
      if (warp == 1) publish_exact_heads(p, shared);
    }
    if ((!kLateExact && steps + exact_steps == 0) || warp != 0 || !elect_one()) return;
    stream_tiles<kD, kM, kRows>(p, maps, shared, steps, exact_steps, present);
    return;
  }

  registers_grow<240>();
  if constexpr (kPdl) wait_for_dependencies();
  const int begin = uniform_register(task.begin), end = uniform_register(task.end);
  const uint32_t thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const auto tile_at = [&](int index, int stage) { return base + (index + stage) * Shared::kBytes; };  // 0 K, 1 V, 2 Q, 4 dO
  float acc[kD / 2];  // dV or dK
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) acc[i] = 0.f;

  int step = 0;
  // ================ warpgroup 1: S, P and dV ================
  // Steps up to `last` (excluded) as parts of `work`; with kScale those of the exact heads.
  const auto walk_values = [&](auto work, int last_step) {
    constexpr BackwardWork kPart = decltype(work)::value;
    constexpr bool kGiveP = kKeys && kPart != BackwardWork::kScale;
    const float scale_log2 = p.softmax_scale * kLog2e;
    const auto v_at = [&](int j, int h) {
      return reinterpret_cast<uint32_t*>(shared.v + j / 8 * (kRows * kSlabRowBytes) + swizzled(row + 8 * h, j % 8) + column * 2);
    };
    // dscale of a head: the columns of V * (P^T g), summed over the rows.
    const auto sum_columns = [&](int head) {
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        const float2 v0 = unpack<T>(*v_at(j, 0)), v1 = unpack<T>(*v_at(j, 1));
        float x = v0.x * acc[4 * j] + v1.x * acc[4 * j + 2], y = v0.y * acc[4 * j + 1] + v1.y * acc[4 * j + 3];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step), y += __shfl_xor_sync(0xffffffffu, y, step);
        if (lane < 4) *reinterpret_cast<float2*>(&shared.column_sums[thread / 32][8 * j + column]) = make_float2(x, y);
        acc[4 * j] = acc[4 * j + 1] = acc[4 * j + 2] = acc[4 * j + 3] = 0.f;
      }
      named_sync(2, 128);
      for (int c = thread; c < kD; c += 128) {
        p.dscale_exact[(task.tile * p.heads_q + head) * kD + c] =
            shared.column_sums[0][c] + shared.column_sums[1][c] + shared.column_sums[2][c] + shared.column_sums[3][c];
      }
      named_sync(2, 128);  // nobody still reads the sums
    };

    const auto k_rows = Operand<Major::kK, kRows>::at_uniform(tile_at(0, 0));
    float s[kM / 2];
    barrier_wait(&shared.v_full, 0);
    barrier_wait(&shared.k_full, 0);
    barrier_wait(&shared.q_full[stage_of<kStages>(step)], phase_of<kStages>(step));
    wgmma_fence();
    lean_product<T, kD>(s, k_rows, Operand<Major::kK, kM>::at_uniform(tile_at(2, stage_of<kStages>(step))), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(s);
    int m = begin;
    [[maybe_unused]] int head = task.first_exact_head();
    for (;; ++step) {
      const int stage = stage_of<kStages>(step);
      if (m < task.full_begin || m >= task.full_end) task.mask(p, s, m, task.first_key + row);
      float2 lse2[kM / 8];
      read_columns(lse2, shared.lse2[stage], lane % 4);
#pragma unroll
      for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * j + i] = exp2_approx(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse2[j].x : lse2[j].y));
      }
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      if constexpr (kGiveP) {
        barrier_wait(&shared.p_empty[step & 1], phase_of<2>(step) ^ 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) shared.p[step & 1][i][thread] = make_uint4(p_rows[4 * i], p_rows[4 * i + 1], p_rows[4 * i + 2], p_rows[4 * i + 3]);
      }
      __syncwarp();
      if (lane == 0) {
        if (kGiveP) barrier_arrive(&shared.p_full[step & 1]);
        barrier_arrive(&shared.q_empty[stage]);
      }
      const bool last = step == last_step - 1;
      float next_s[kM / 2];
      barrier_wait(&shared.do_full[stage], phase_of<kStages>(step));
      wgmma_fence();
      product<T, Major::kMN, kM>(acc, p_rows, Operand<Major::kMN, kM>::at_uniform(tile_at(4, stage)), true);
      wgmma_commit();
      if (!last) barrier_wait(&shared.q_full[stage_of<kStages>(step + 1)], phase_of<kStages>(step + 1));
      wgmma_fence();
      lean_product<T, kD>(next_s, k_rows, Operand<Major::kK, kM>::at_uniform(tile_at(2, stage_of<kStages>(step + 1))), false);
      wgmma_commit();
      wgmma_wait<1>();  // dV
      if (lane == 0) barrier_arrive(&shared.do_empty[stage]);
      wgmma_wait<0>();
      fence_registers(acc);
      fence_registers(next_s);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) s[i] = next_s[i];
      if (++m == end) {
        m = begin;
        if constexpr (kPart == BackwardWork::kScale) sum_columns(head), head = task.next_exact_head(head);
      }
      if (last) break;
    }
    ++step;
  };
  // ================ warpgroup 2: dP, dS and dK ================
  const auto walk_keys = [&] {
    const auto v_rows = Operand<Major::kK, kRows>::at_uniform(tile_at(1, 0));
    float dp[kM / 2];
    barrier_wait(&shared.v_full, 0);
    barrier_wait(&shared.do_full[0], 0);
    wgmma_fence();
    lean_product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(tile_at(4, 0)), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(dp);
    for (;; ++step) {
      const int stage = stage_of<kStages>(step);
      const bool last = step == steps - 1;
      barrier_wait(&shared.p_full[step & 1], phase_of<2>(step));
      uint32_t ds[kM / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 x = shared.p[step & 1][i][thread];
        ds[4 * i] = x.x, ds[4 * i + 1] = x.y, ds[4 * i + 2] = x.z, ds[4 * i + 3] = x.w;
      }
      float2 delta[kM / 8];
      read_columns(delta, shared.delta[stage], lane % 4);
#pragma unroll
      for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 probability = unpack<T>(ds[2 * j + h]);
          ds[2 * j + h] = pack<T>(probability.x * (dp[4 * j + 2 * h] - delta[j].x), probability.y * (dp[4 * j + 2 * h + 1] - delta[j].y));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.p_empty[step & 1]), barrier_arrive(&shared.do_empty[stage]);
      float next_dp[kM / 2];
      barrier_wait(&shared.q_full[stage], phase_of<kStages>(step));
      wgmma_fence();
      product<T, Major::kMN, kM>(acc, ds, Operand<Major::kMN, kM>::at_uniform(tile_at(2, stage)), true);
      wgmma_commit();
      if (!last) barrier_wait(&shared.do_full[stage_of<kStages>(step + 1)], phase_of<kStages>(step + 1));
      wgmma_fence();
      lean_product<T, kD>(next_dp, v_rows, Operand<Major::kK, kM>::at_uniform(tile_at(4, stage_of<kStages>(step + 1))), false);
      wgmma_commit();
      wgmma_wait<1>();  // dK
      if (lane == 0) barrier_arrive(&shared.q_empty[stage]);
      wgmma_wait<0>();
      fence_registers(acc);
      fence_registers(next_dp);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) dp[i] = next_dp[i];
      if (last) break;
    }
    ++step;
  };
  // ================ epilogue ================
  const auto store = [&] {
    const bool of_values = warp < 8;
    if (p.splits > 1) {
      float* const partial = of_values ? p.dv_partial : p.dk_partial;
      if (partial == nullptr) return;
      const int64_t at = ((static_cast<int64_t>(task.split) * p.heads_k + task.head_k) * p.tile_count_k + task.tile) * kRows * kD;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        float4* const to = reinterpret_cast<float4*>(partial + at) + ((j / 16 * 4 + thread / 32) * 16 + j % 16) * 32 + lane;
        *to = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
      }
      return;
    }
    named_sync(1, 256);  // both warpgroups are done with the stages
    void* const output = of_values ? p.grad_v : p.grad_k;
    if (output == nullptr) return;
    const int first_row = thread / 32 * 16;
    float* const tile = reinterpret_cast<float*>(shared.q) + ((of_values ? 0 : kRows) + first_row) * (kD + kPad);
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(tile + (lane / 4 + 8 * h) * (kD + kPad) + 8 * j + column) = make_float2(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
      }
    }
    __syncwarp();
    store_rows<T, kD>(p, tile, min(16, task.seq.length_k - task.first_key - first_row), output, task.seq.first_k + task.first_key + first_row,
                      task.batch_row, p.seqlen_k, task.head_k, p.heads_k, of_values ? 1.f : p.softmax_scale, !of_values && p.cos != nullptr,
                      p.positions_k);
  };

  if constexpr (kWork != BackwardWork::kScale) {
    if (steps > 0 && warp < 8) walk_values(std::integral_constant<BackwardWork, kWork>(), steps);
    if constexpr (kKeys) {
      if (steps > 0 && warp >= 8) walk_keys();
    }
    store();
    if constexpr (kLateExact) {
      barrier_wait(&shared.exact_known, 0);
      exact_steps = task.exact_steps();
    }
    if (exact_steps > 0 && present < slabs(kD)) {  // the epilogue has overwritten the zeros
      named_sync(1, 256);
      zero_absent_slabs<64, kD>(shared.q[0], 2 * kStages, present, threadIdx.x - 128, 256);
    }
    // The epilogue's writes come before the copy engine's into the same memory.
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.stages_free);
  }
  if constexpr (kLateExact && kWork == BackwardWork::kScale) {
    barrier_wait(&shared.exact_known, 0);
    exact_steps = task.exact_steps();
  }
  if (warp >= 8) {
    if constexpr (kKeys) {
      for (step = steps; step < steps + exact_steps; ++step) {  // has nothing to do but release the stages
        const int stage = stage_of<kStages>(step);
        barrier_wait(&shared.q_full[stage], phase_of<kStages>(step));
        barrier_wait(&shared.do_full[stage], phase_of<kStages>(step));
        if (lane == 0) barrier_arrive(&shared.q_empty[stage]), barrier_arrive(&shared.do_empty[stage]);
      }
    }
  } else if (exact_steps > 0) {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc[i] = 0.f;
    walk_values(std::integral_constant<BackwardWork, BackwardWork::kScale>(), steps + exact_steps);
  } else {
    for (uint64_t rest = task.exact; rest != 0; rest &= rest - 1) {  // a tile of keys that nobody sees
      for (int c = thread; c < kD; c += 128) p.dscale_exact[(task.tile * p.heads_q + task.first_head + __ffsll(rest) - 1) * kD + c] = 0.f;
    }
  }
}

}  // namespace seal::sm90
