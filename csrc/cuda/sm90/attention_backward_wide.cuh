// dK and dV for head_dim up to 256: one CTA owns 64 keys of one key/value head. The accumulators of dK and dV fill a
// warpgroup each, so the warpgroups divide the work by product instead of by keys:
//   warpgroup 1:  S^T = K Q^T, P, dV += P^T dO      (and with it dscale)
//   warpgroup 2:  dP^T = V dO^T, dS, dK += dS^T Q
// P goes from the first to the second through shared memory. While one takes exponentials or makes dS, the other's products
// keep the tensor cores busy. dQ comes from attention_backward_query.cuh: with only 64 keys a tile, adding dQ up in memory
// costs as much as computing S and dP twice (measured: the same time), and is not deterministic.
//
// Scale: as in attention_backward_main.cuh; warpgroup 1 scales V in shared memory, warpgroup 2 waits for it.
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
  float lse2[kStages][kM], delta[kStages][kM];
  float scale[4][kD], column_sums[4][kD];
  uint64_t k_full, v_full, v_empty, v_scaled, q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages], p_full[2], p_empty[2];
  static_assert(2 * kStages * kBytes + sizeof(p) >= 2 * kRows * (kD + kPad) * 4, "room for the epilogue's tiles");
};

template <class T, BackwardWork kWork>
__global__ void __launch_bounds__(384, 1)
    attention_backward_wide(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = WideShared;
  constexpr int kD = Shared::kD, kM = Shared::kM, kRows = Shared::kRows, kStages = Shared::kStages;
  constexpr bool kKeys = kWork != BackwardWork::kValue;   // warpgroup 2 has work
  constexpr int kReaders = kKeys ? 8 : 4;                 // warps that release a stage
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == 1) {
    const BackwardTask<kM, kRows> task(p);
    if (lane == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    barrier_init(&shared.k_full, 1);
    barrier_init(&shared.v_full, 1);
    barrier_init(&shared.v_empty, 4);
    barrier_init(&shared.v_scaled, 4);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], kReaders);
      barrier_init(&shared.do_full[i], 1), barrier_init(&shared.do_empty[i], kReaders);
      barrier_init(&shared.p_full[i], 4), barrier_init(&shared.p_empty[i], 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_dependencies();
  const BackwardTask<kM, kRows>& task = shared.task;
  const bool has_scale = p.scale != nullptr;

  if (warp < 4) {
    // ================ producers ================
    registers_shrink<24>();
    const bool packed = p.cu_seqlens_k != nullptr;
    const Sequence& seq = task.seq;
    const int steps = task.steps(p);
    if (steps == 0) return;
    const RowCoordinates key_rows(packed, kRows, task.first_key, seq.length_k, packed ? seq.first_k : task.batch_row);
    if (warp == 0 && elect_one()) {
      const uint64_t keep = policy_evict_last();
      barrier_expect_bytes(&shared.k_full, Shared::kBytes);
      tma_load_tile<kRows, kD>(shared.k, &maps.k, &shared.k_full, task.head_k, key_rows, keep);
      int head = task.first_head, m = task.begin;
      for (int step = 0; step < steps; ++step) {
        const int stage = stage_of<kStages>(step);
        const uint32_t phase = phase_of<kStages>(step) ^ 1;
        const RowCoordinates rows(packed, kM, m * kM, seq.length_q, packed ? seq.first_q : task.batch_row);
        const int64_t row = head * p.padded_rows_q + seq.padded_q + m * kM;
        barrier_wait(&shared.q_empty[stage], phase);
        barrier_expect_bytes(&shared.q_full[stage], Shared::kBytes + kM * 4);
        tma_load_tile<kM, kD>(shared.q[stage], &maps.q, &shared.q_full[stage], head, rows, keep);
        bulk_load(shared.lse2[stage], p.lse2 + row, kM * 4, &shared.q_full[stage]);
        barrier_wait(&shared.do_empty[stage], phase);
        barrier_expect_bytes(&shared.do_full[stage], Shared::kBytes + kM * 4);
        tma_load_tile<kM, kD>(shared.grad_out[stage], &maps.grad_out, &shared.do_full[stage], head, rows, keep);
        bulk_load(shared.delta[stage], p.delta + row, kM * 4, &shared.do_full[stage]);
        if (++m == task.end) m = task.begin, ++head;
      }
    } else if (warp == 1 && elect_one()) {
      const int loads = kKeys && has_scale ? p.heads_per_cta + 1 : 1;
      for (int i = 0; i < loads; ++i) {
        barrier_wait(&shared.v_empty, (i & 1) ^ 1);
        barrier_expect_bytes(&shared.v_full, Shared::kBytes);
        tma_load_tile<kRows, kD>(shared.v, &maps.v, &shared.v_full, task.head_k, key_rows, policy_evict_last());
      }
    }
    return;
  }

  registers_grow<240>();
  const int begin = uniform_register(task.begin), end = uniform_register(task.end);
  const uint32_t thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const auto tile_at = [&](int index, int stage) { return base + (index + stage) * Shared::kBytes; };  // 0 K, 1 V, 2 Q, 4 dO
  float acc[kD / 2];  // dV or dK
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) acc[i] = 0.f;
  const int steps = task.steps(p);

  if (warp < 8) {
    // ================ S, P and dV ================
    if (steps > 0) {
      const float scale_log2 = p.softmax_scale * kLog2e;
      const auto v_at = [&](int j, int h) {
        return reinterpret_cast<uint32_t*>(shared.v + j / 8 * (kRows * kSlabRowBytes) + swizzled(row + 8 * h, j % 8) + column * 2);
      };
      // A head's scale into shared memory, a head ahead of its use.
      const auto load_scale = [&](int head) {
        if (head >= task.first_head + p.heads_per_cta) return;
        const float* const from = p.scale + task.seq.index * p.scale_batch_stride + head * p.scale_head_stride;
#pragma unroll
        for (int c = thread; c < kD; c += 128) {
          const bool inside = c < p.head_dim;
          copy_float(&shared.scale[head % 4][c], from + (inside ? c * p.scale_channel_stride : 0), inside);
        }
      };
      const auto scale_at = [&](int head, int j) { return *reinterpret_cast<const float2*>(&shared.scale[head % 4][8 * j + column]); };
      const auto scale_v = [&](int head) {
#pragma unroll 4
        for (int j = 0; j < kD / 8; ++j) {
          const float2 factor = scale_at(head, j);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 value = unpack<T>(*v_at(j, h));
            *v_at(j, h) = pack<T>(value.x * factor.x, value.y * factor.y);
          }
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.v_scaled);
      };
      const auto end_of_head = [&](int head_index) {
        const int head = task.first_head + head_index;
        const bool first = head_index == 0, last = head_index == p.heads_per_cta - 1;
        if (kKeys) barrier_wait(&shared.v_full, (head_index + 1) & 1);
        if (p.dscale_partial != nullptr) {
          // Columns of V * dV summed over the warp's 16 rows: every step halves the columns a lane keeps.
#pragma unroll
          for (int part = 0; part < kD / 32; ++part) {
            asm volatile("" ::: "memory");
            float x[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int j = 4 * part + i;
              const float2 v0 = unpack<T>(*v_at(j, 0)), v1 = unpack<T>(*v_at(j, 1));
              x[2 * i] = v0.x * acc[4 * j] + v1.x * acc[4 * j + 2], x[2 * i + 1] = v0.y * acc[4 * j + 1] + v1.y * acc[4 * j + 3];
            }
#pragma unroll
            for (int half = 4; half > 0; half /= 2) {
              const bool upper = lane & (4 * half);
#pragma unroll
              for (int i = 0; i < half; ++i) {
                const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
                x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, 4 * half);
              }
            }
            shared.column_sums[thread / 32][32 * part + 8 * (lane / 8) + column + lane / 4 % 2] = x[0];
          }
        }
        copies_done();
        named_sync(2, 128);
        if (!last) load_scale(head + 2);
        if (p.dscale_partial != nullptr) {
          for (int c = thread; c < kD; c += 128) {
            p.dscale_partial[(task.tile * p.heads_q + head) * kD + c] =
                shared.column_sums[0][c] + shared.column_sums[1][c] + shared.column_sums[2][c] + shared.column_sums[3][c];
          }
        }
        float4* const sum = reinterpret_cast<float4*>(p.dv_sum + (task.head_k * p.tile_count_k + task.tile) * kRows * kD) + thread;
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
          if (j % 4 == 0) asm volatile("" ::: "memory");
          const float2 factor = scale_at(head, j);
          float4 x = make_float4(acc[4 * j] * factor.x, acc[4 * j + 1] * factor.y, acc[4 * j + 2] * factor.x, acc[4 * j + 3] * factor.y);
          if (!last) {
            if (first) sum[j * 128] = x;
            else reduce_add(reinterpret_cast<float*>(sum + j * 128), x.x, x.y, x.z, x.w);
            x = make_float4(0.f, 0.f, 0.f, 0.f);
          } else if (!first) {
            const float4 before = sum[j * 128];
            x.x += before.x, x.y += before.y, x.z += before.z, x.w += before.w;
          }
          acc[4 * j] = x.x, acc[4 * j + 1] = x.y, acc[4 * j + 2] = x.z, acc[4 * j + 3] = x.w;
        }
        if (kKeys && !last) scale_v(head + 1);
        named_sync(2, 128);  // nobody still reads the sums and scales
      };

      const auto k_rows = Operand<Major::kK, kRows>::at_uniform(tile_at(0, 0));
      float s[kM / 2];
      barrier_wait(&shared.v_full, 0);
      if (has_scale) {
        load_scale(task.first_head);
        load_scale(task.first_head + 1);
        copies_done();
        named_sync(2, 128);
        if (kKeys) scale_v(task.first_head);
      }
      barrier_wait(&shared.k_full, 0);
      barrier_wait(&shared.q_full[0], 0);
      wgmma_fence();
      lean_product<T, kD>(s, k_rows, Operand<Major::kK, kM>::at_uniform(tile_at(2, 0)), false);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(s);
      int m = begin, head = 0;
      for (int step = 0;; ++step) {
        const int stage = stage_of<kStages>(step);
        if (m < task.full_begin || m >= task.full_end) task.mask(p, s, m, task.first_key + row);
#pragma unroll
        for (int j = 0; j < kM / 8; ++j) {
          const float2 lse2 = *reinterpret_cast<const float2*>(&shared.lse2[stage][8 * j + column]);
          s[4 * j] = exp2_approx(s[4 * j] * scale_log2 - lse2.x);
          s[4 * j + 1] = exp2_approx(s[4 * j + 1] * scale_log2 - lse2.y);
          s[4 * j + 2] = exp2_approx(s[4 * j + 2] * scale_log2 - lse2.x);
          s[4 * j + 3] = exp2_approx(s[4 * j + 3] * scale_log2 - lse2.y);
        }
        uint32_t p_rows[kM / 4];
        pack_fragment<T>(p_rows, s);
        if constexpr (kKeys) {
          barrier_wait(&shared.p_empty[step & 1], phase_of<2>(step) ^ 1);
#pragma unroll
          for (int i = 0; i < 4; ++i) shared.p[step & 1][i][thread] = make_uint4(p_rows[4 * i], p_rows[4 * i + 1], p_rows[4 * i + 2], p_rows[4 * i + 3]);
        }
        __syncwarp();
        if (lane == 0) {
          if (kKeys) barrier_arrive(&shared.p_full[step & 1]);
          barrier_arrive(&shared.q_empty[stage]);
        }
        const bool last_of_head = m == end - 1, last = last_of_head && head == p.heads_per_cta - 1;
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
        ++m;
        if (last_of_head) {
          if (has_scale) end_of_head(head);
          if (last) break;
          m = begin, ++head;
        }
      }
    } else if (p.dscale_partial != nullptr) {
      for (int i = thread; i < p.heads_per_cta * kD; i += 128) p.dscale_partial[(task.tile * p.heads_q + task.first_head) * kD + i] = 0.f;
    }
  } else if constexpr (kKeys) {
    // ================ dP, dS and dK ================
    if (steps > 0) {
      const auto v_rows = Operand<Major::kK, kRows>::at_uniform(tile_at(1, 0));
      const auto wait_for_v = [&](int head) {  // scaled for that head
        if (has_scale) barrier_wait(&shared.v_scaled, head & 1);
      };
      float dp[kM / 2];
      barrier_wait(&shared.v_full, 0);
      wait_for_v(0);
      barrier_wait(&shared.do_full[0], 0);
      wgmma_fence();
      lean_product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(tile_at(4, 0)), false);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(dp);
      int m = begin, head = 0;
      for (int step = 0;; ++step) {
        const int stage = stage_of<kStages>(step);
        const bool last_of_head = m == end - 1, last = last_of_head && head == p.heads_per_cta - 1;
        if (has_scale && last_of_head && lane == 0) barrier_arrive(&shared.v_empty);
        barrier_wait(&shared.p_full[step & 1], phase_of<2>(step));
        uint32_t ds[kM / 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 x = shared.p[step & 1][i][thread];
          ds[4 * i] = x.x, ds[4 * i + 1] = x.y, ds[4 * i + 2] = x.z, ds[4 * i + 3] = x.w;
        }
#pragma unroll
        for (int j = 0; j < kM / 8; ++j) {
          const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][8 * j + column]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 probability = unpack<T>(ds[2 * j + h]);
            ds[2 * j + h] = pack<T>(probability.x * (dp[4 * j + 2 * h] - delta.x), probability.y * (dp[4 * j + 2 * h + 1] - delta.y));
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.p_empty[step & 1]), barrier_arrive(&shared.do_empty[stage]);
        float next_dp[kM / 2];
        barrier_wait(&shared.q_full[stage], phase_of<kStages>(step));
        wgmma_fence();
        product<T, Major::kMN, kM>(acc, ds, Operand<Major::kMN, kM>::at_uniform(tile_at(2, stage)), true);
        wgmma_commit();
        if (!last) {
          if (last_of_head) wait_for_v(head + 1);
          barrier_wait(&shared.do_full[stage_of<kStages>(step + 1)], phase_of<kStages>(step + 1));
        }
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
        ++m;
        if (last) break;
        if (last_of_head) m = begin, ++head;
      }
    }
  }

  // ================ epilogue ================
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
}

}  // namespace seal::sm90
