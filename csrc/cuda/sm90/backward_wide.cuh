// dK and dV for head_dim up to 256: one thread block owns 64 keys of one key/value head. The accumulators of dK and dV fill a
// warpgroup each, so the consumer warpgroups divide the work by product instead of by keys:
//   warpgroup 1:  S^T = K Q^T, P, dV += P^T dO
//   warpgroup 2:  dP^T = V dO^T, dS, dK += dS^T Q
// P goes from the first to the second through shared memory. While one takes exponentials or makes dS, the other's products
// keep the tensor cores busy. dQ comes from backward_query.cuh: with only 64 keys a tile, adding dQ up in memory
// costs as much as computing S and dP twice (measured: the same time), and is not deterministic. Heads whose dscale must be
// exact are walked through once more after the epilogue, as in backward_kernel.cuh, by the first warpgroup.
#pragma once

#include "backward_keys.cuh"
#include "backward_store.cuh"

namespace seal::sm90 {

template <class T_, BackwardWork kWork_, Masking kMasking_>
struct WideConfig {
  using T = T_;
  static constexpr Masking kMasking = kMasking_;
  static constexpr BackwardWork kWork = kWork_;
  static constexpr int kHeadDim = 256;
  static constexpr int kBlockM = 64, kBlockN = 64;
  static constexpr int kStages = 2;     // of Q with lse2, of dO with delta
  static constexpr int kPStages = 2;
  static constexpr bool kKeys = kWork == BackwardWork::kAll || kWork == BackwardWork::kKeyValue;  // warpgroup 2 has work
  static constexpr int kWarpgroups = 2;  // consumers
  static constexpr int kThreads = 128 * (kWarpgroups + 1), kConsumerThreads = 128 * kWarpgroups, kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kReaderWarps = kKeys ? kConsumerWarps : 4;  // that release a stage
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kRowAhead = true;  // see BackwardConfig
  static constexpr int kTileBytes = tile_bytes(64, kHeadDim);  // of any tile
};

// Who fills and who empties what; counts as in backward_config.cuh.
//
//   buffer               filled by                  read by                            count of full, empty
//   k; v                 warp 0 (copy engine)       warpgroup 1; 2, and 1 for the      1 and bytes, never emptied
//                                                   exact dscale
//   q, lse2 [stage]      warp 0 (copy engine)       warpgroup 1, for S; 2, last by     1 and bytes, kReaderWarps
//                                                   the product dK
//   grad_out, delta      warp 0 (copy engine)       warpgroup 1, last by the product   1 and bytes, kReaderWarps
//     [stage]                                       dV; 2, for dP
//   p[stage]             warpgroup 1                warpgroup 2, into registers        4, 4
//
// stages_free: the consumers tell warp 0 that the epilogue has left q .. p, where it stages dK and dV.
template <class Config>
struct WideShared {
  using Task = BackwardTask<Config::kBlockM, Config::kBlockN, Config::kMasking>;
  static constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM;

  char k[Config::kTileBytes], v[Config::kTileBytes];
  char q[kStages][Config::kTileBytes], grad_out[kStages][Config::kTileBytes];
  uint4 p[Config::kPStages][4][128];  // P of a step in accumulator order; after the loop q .. p: the epilogue's fp32 tiles
  Task task;
  alignas(16) float lse2[kStages][kBlockM], delta[kStages][kBlockM];  // filled by bulk copies
  float column_sums[4 * Config::kHeadDim];
  uint64_t k_full, v_full, stages_free;
  uint64_t q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages];
  uint64_t p_full[Config::kPStages], p_empty[Config::kPStages];

  // The fp32 tile of dV (0) or dK (1) on its way out.
  SEAL_DEVICE float* staging(int index) { return reinterpret_cast<float*>(q) + index * Config::kBlockN * (Config::kHeadDim + kPad); }
  static_assert(2 * kStages * Config::kTileBytes + sizeof(p) >= 2 * Config::kBlockN * (Config::kHeadDim + kPad) * 4,
                "room for the epilogue's tiles");

  // By one thread.
  SEAL_DEVICE void init_barriers() {
    barrier_init(&k_full, 1);
    barrier_init(&v_full, 1);
    barrier_init(&stages_free, Config::kConsumerWarps);
    barriers_init(q_full, 1);
    barriers_init(q_empty, Config::kReaderWarps);
    barriers_init(do_full, 1);
    barriers_init(do_empty, Config::kReaderWarps);
    barriers_init(p_full, 4);
    barriers_init(p_empty, 4);
  }
};

// Steps of the task: those of all its heads; those of its exact heads come once more.
template <class Config>
SEAL_DEVICE int wide_steps_of(const BackwardKernelParams& p, const typename WideShared<Config>::Task& task) {
  return Config::kWork == BackwardWork::kScale ? 0 : (task.end - task.begin) * p.heads_per_cta;
}

// One thread of warp 0: K and V, then step by step Q with lse2 and dO with delta; once the epilogue has left the stages, the steps
// of the exact heads with the unscaled dO. present: see tma_load_tile().
template <class Config>
SEAL_DEVICE void produce_wide_operands(WideShared<Config>& shared, const BackwardKernelParams& p, const BackwardMaps& maps, int present) {
  constexpr int kD = Config::kHeadDim;
  const auto& task = shared.task;
  const int steps = wide_steps_of<Config>(p, task), exact_steps = task.exact_steps();
  if (steps + exact_steps == 0) return;
  const uint64_t keep = policy_evict_last();
  const RowCoordinates keys = key_coordinates<Config>(p, task);
  load_keys<Config>(shared.k, &maps.k, &shared.k_full, task.head_k, keys, keep, present);
  load_keys<Config>(shared.v, &maps.v, &shared.v_full, task.head_k, keys, keep, present);
  wait_for_dependencies();  // K and V are the caller's; the vectors and scale * g come from attention_backward_rows
  int step = 0;
  for (int head = task.first_head, place = task.begin; step < steps; ++step) {
    load_step<Config>(shared, p, &maps.q, &maps.grad_out, task, step, head, query_tile<kD>(task.begin, task.end, place), keep, present);
    if (++place == task.end) {
      place = task.begin;
      ++head;
    }
  }
  if (exact_steps > 0 && steps > 0) barrier_wait(&shared.stages_free, 0);
  for (int head = task.first_exact_head(), place = task.begin; step < steps + exact_steps; ++step) {
    load_step<Config>(shared, p, &maps.q, &maps.unscaled_grad_out, task, step, head, query_tile<kD>(task.begin, task.end, place), keep, present);
    if (++place == task.end) {
      place = task.begin;
      head = task.next_exact_head(head);
    }
  }
}

// One of the two consumer warpgroups: `values` makes dV, the other dK. A step, of the ring's stage s and of P's place b:
//
//   warpgroup 1 waits for    does                          lets go of    |  warpgroup 2 waits for    does                lets go of
//   (S is there)             mask, P = exp2(S - lse)                     |  p_full[b] (dP is there)  P to registers
//   p_empty[b]               P to shared memory            p_full[b],    |                           dS = P (dP - delta) p_empty[b],
//                                                          q_empty[s]    |                                               do_empty[s]
//   do_full[s]               issues dV += P dO                           |  q_full[s]                issues dK += dS Q
//   q_full of the next step  issues S of the next step                   |  do_full of the next step issues dP of the next step
//   dV                                                     do_empty[s]   |  dK                                           q_empty[s]
//   S                                                                    |  dP
//
// Warpgroup 2 comes a step's exponentials behind, which keeps their products apart.
template <class Config>
class WideConsumer {
  using T = typename Config::T;
  using Shared = WideShared<Config>;
  static constexpr int kD = Config::kHeadDim, kM = Config::kBlockM, kN = Config::kBlockN, kStages = Config::kStages;
  static constexpr bool kKeys = Config::kKeys;
  template <BackwardWork kPart>
  using Part = std::integral_constant<BackwardWork, kPart>;

 public:
  SEAL_DEVICE WideConsumer(Shared& shared, uint32_t base, const BackwardKernelParams& p, bool values)
      : shared_(shared), task_(shared.task), p_(p), base_(base), values_(values), thread_(threadIdx.x % 128), lane_(threadIdx.x % 32),
        row_(thread_ / 32 * 16 + lane_ / 4) {}

  SEAL_DEVICE void run(int present) {
    const int steps = wide_steps_of<Config>(p_, task_), exact_steps = task_.exact_steps();
    clear();
    if constexpr (Config::kWork != BackwardWork::kScale) {
      if (steps > 0 && values_) walk_values(Part<Config::kWork>(), steps);
      if constexpr (kKeys) {
        if (steps > 0 && !values_) walk_keys(steps);
      }
      store();
      if (exact_steps > 0 && present < slabs(kD)) {  // the epilogue has overwritten the zeros
        meet();
        zero_absent_slabs<64, kD>(shared_.q[0], 2 * kStages, present, threadIdx.x - 128, Config::kConsumerThreads);
      }
      // The epilogue's writes come before the copy engine's into the same memory.
      fence_proxy_async();
      __syncwarp();
      release(&shared_.stages_free);
    }
    if (!values_) {
      if constexpr (kKeys) skip(steps, exact_steps);
    } else if (exact_steps > 0) {
      clear();
      walk_values(Part<BackwardWork::kScale>(), steps + exact_steps);
    } else {
      clear_exact_dscale<kD>(p_, task_, thread_, 128);
    }
  }

 private:
  static SEAL_DEVICE void meet() { named_sync(kBarrierConsumers, Config::kConsumerThreads); }

  SEAL_DEVICE void release(uint64_t* barrier) const {
    if (lane_ == 0) barrier_arrive(barrier);
  }
  SEAL_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) accumulator_[i] = 0.f;
  }

  SEAL_DEVICE uint32_t keys_at() const { return base_; }
  SEAL_DEVICE uint32_t values_at() const { return base_ + Config::kTileBytes; }
  SEAL_DEVICE uint32_t queries_at(int step) const { return base_ + (2 + stage_of<kStages>(step)) * Config::kTileBytes; }
  SEAL_DEVICE uint32_t grad_out_at(int step) const { return base_ + (2 + kStages + stage_of<kStages>(step)) * Config::kTileBytes; }

  // ---- warpgroup 1: S, P and dV. Steps up to `last` (excluded) as parts of kPart; with kScale those of the exact heads.
  template <BackwardWork kPart>
  SEAL_DEVICE void walk_values(Part<kPart>, int last_step) {
    constexpr bool kGiveP = kKeys && kPart != BackwardWork::kScale;
    const float scale_log2 = p_.softmax_scale * kLog2e;
    const int begin = uniform_register(task_.begin), end = uniform_register(task_.end);
    const auto k_rows = Operand<Major::kK, kN>::at_uniform(keys_at());
    float s[kM / 2];
    barrier_wait(&shared_.v_full, 0);
    barrier_wait(&shared_.k_full, 0);
    barrier_wait(&shared_.q_full[stage_of<kStages>(step_)], phase_of<kStages>(step_));
    wgmma_fence();
    lean_product<T, kD>(s, k_rows, Operand<Major::kK, kM>::at_uniform(queries_at(step_)), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(s);
    int tile = begin;
    [[maybe_unused]] int head = task_.first_exact_head();
    for (;; ++step_) {
      const int stage = stage_of<kStages>(step_);
      if (tile < task_.whole_begin || tile >= task_.whole_end) task_.mask(p_, s, tile, row_);
      float2 lse2[kM / 8];
      read_columns(lse2, shared_.lse2[stage], lane_ % 4);
      exponentiate(s, lse2, scale_log2);
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      if constexpr (kGiveP) {
        barrier_wait(&shared_.p_empty[step_ & 1], phase_of<2>(step_) ^ 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared_.p[step_ & 1][i][thread_] = make_uint4(p_rows[4 * i], p_rows[4 * i + 1], p_rows[4 * i + 2], p_rows[4 * i + 3]);
        }
      }
      __syncwarp();
      if (lane_ == 0) {
        if (kGiveP) barrier_arrive(&shared_.p_full[step_ & 1]);
        barrier_arrive(&shared_.q_empty[stage]);
      }
      const bool last = step_ == last_step - 1;
      float next_s[kM / 2];
      barrier_wait(&shared_.do_full[stage], phase_of<kStages>(step_));
      wgmma_fence();
      product<T, Major::kMN, kM>(accumulator_, p_rows, Operand<Major::kMN, kM>::at_uniform(grad_out_at(step_)), true);
      wgmma_commit();
      // S of the next step; after the last one an old stage is multiplied to no purpose.
      if (!last) barrier_wait(&shared_.q_full[stage_of<kStages>(step_ + 1)], phase_of<kStages>(step_ + 1));
      wgmma_fence();
      lean_product<T, kD>(next_s, k_rows, Operand<Major::kK, kM>::at_uniform(queries_at(step_ + 1)), false);
      wgmma_commit();
      wgmma_wait<1>();  // dV
      release(&shared_.do_empty[stage]);
      wgmma_wait<0>();
      fence_registers(accumulator_);
      fence_registers(next_s);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) s[i] = next_s[i];
      if (++tile == end) {
        tile = begin;
        if constexpr (kPart == BackwardWork::kScale) {
          sum_columns<T, kD, kN, 4>(p_, shared_.v, shared_.column_sums, task_.tile, head, accumulator_, kBarrierValues);
          clear();
          head = task_.next_exact_head(head);
        }
      }
      if (last) break;
    }
    ++step_;
  }

  // ---- warpgroup 2: dP, dS and dK
  SEAL_DEVICE void walk_keys(int steps) {
    const auto v_rows = Operand<Major::kK, kN>::at_uniform(values_at());
    float dp[kM / 2];
    barrier_wait(&shared_.v_full, 0);
    barrier_wait(&shared_.do_full[0], 0);
    wgmma_fence();
    lean_product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(grad_out_at(0)), false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(dp);
    for (;; ++step_) {
      const int stage = stage_of<kStages>(step_);
      const bool last = step_ == steps - 1;
      barrier_wait(&shared_.p_full[step_ & 1], phase_of<2>(step_));
      uint32_t ds[kM / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 x = shared_.p[step_ & 1][i][thread_];
        ds[4 * i] = x.x;
        ds[4 * i + 1] = x.y;
        ds[4 * i + 2] = x.z;
        ds[4 * i + 3] = x.w;
      }
      float2 delta[kM / 8];
      read_columns(delta, shared_.delta[stage], lane_ % 4);
#pragma unroll
      for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 probability = unpack<T>(ds[2 * j + h]);
          ds[2 * j + h] = pack<T>(probability.x * (dp[4 * j + 2 * h] - delta[j].x), probability.y * (dp[4 * j + 2 * h + 1] - delta[j].y));
        }
      }
      __syncwarp();
      if (lane_ == 0) {
        barrier_arrive(&shared_.p_empty[step_ & 1]);
        barrier_arrive(&shared_.do_empty[stage]);
      }
      float next_dp[kM / 2];
      barrier_wait(&shared_.q_full[stage], phase_of<kStages>(step_));
      wgmma_fence();
      product<T, Major::kMN, kM>(accumulator_, ds, Operand<Major::kMN, kM>::at_uniform(queries_at(step_)), true);
      wgmma_commit();
      if (!last) barrier_wait(&shared_.do_full[stage_of<kStages>(step_ + 1)], phase_of<kStages>(step_ + 1));
      wgmma_fence();
      lean_product<T, kD>(next_dp, v_rows, Operand<Major::kK, kM>::at_uniform(grad_out_at(step_ + 1)), false);
      wgmma_commit();
      wgmma_wait<1>();  // dK
      release(&shared_.q_empty[stage]);
      wgmma_wait<0>();
      fence_registers(accumulator_);
      fence_registers(next_dp);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) dp[i] = next_dp[i];
      if (last) break;
    }
    ++step_;
  }

  // Warpgroup 2 has nothing to do in the steps of the exact heads but release their stages.
  SEAL_DEVICE void skip(int steps, int exact_steps) {
    for (step_ = steps; step_ < steps + exact_steps; ++step_) {
      const int stage = stage_of<kStages>(step_);
      barrier_wait(&shared_.q_full[stage], phase_of<kStages>(step_));
      barrier_wait(&shared_.do_full[stage], phase_of<kStages>(step_));
      release(&shared_.q_empty[stage]);
      release(&shared_.do_empty[stage]);
    }
  }

  // ---- the results

  SEAL_DEVICE void store() {
    if (p_.splits > 1) {
      store_partial();
    } else {
      store_tile();
    }
  }

  SEAL_DEVICE void store_partial() const {
    float* const partial = values_ ? p_.dv_partial : p_.dk_partial;
    if (partial == nullptr) return;
    const int64_t at = ((static_cast<int64_t>(task_.split) * p_.heads_k + task_.head_k) * p_.tile_count_k + task_.tile) * kN * kD;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      float4* const to = reinterpret_cast<float4*>(partial + at) + ((j / 16 * 4 + thread_ / 32) * 16 + j % 16) * 32 + lane_;
      *to = make_float4(accumulator_[4 * j], accumulator_[4 * j + 1], accumulator_[4 * j + 2], accumulator_[4 * j + 3]);
    }
  }

  SEAL_DEVICE void store_tile() {
    meet();  // both warpgroups are done with the stages
    void* const output = values_ ? p_.grad_v : p_.grad_k;
    if (output == nullptr) return;
    const int first_row = thread_ / 32 * 16;
    float* const tile = shared_.staging(values_ ? 0 : 1) + first_row * (kD + kPad);
    stage_rows<kD, 2>(tile, accumulator_, 0, lane_);
    __syncwarp();
    const int row = task_.first_key + first_row;
    store_rows<T, kD>(p_, tile, min(16, task_.seq.length_k - row), output, task_.seq.first_k + row, task_.batch_row, p_.seqlen_k,
                      task_.head_k, p_.heads_k, values_ ? 1.f : p_.softmax_scale, !values_ && p_.cos != nullptr, p_.positions_k);
  }

  Shared& shared_;
  const typename Shared::Task& task_;
  const BackwardKernelParams& p_;
  const uint32_t base_;  // address of shared_
  const bool values_;
  const uint32_t thread_;
  const int lane_, row_;  // row of the key tile, and row + 8
  int step_ = 0;
  float accumulator_[kD / 2];  // dV or dK
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_wide(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = WideShared<Config>;
  constexpr int kD = Config::kHeadDim, kStages = Config::kStages;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  if (warp == 1) {
    typename Shared::Task task;
    task.find(p, blockIdx.x, true);
    task.find_exact_heads(p, true);
    if (threadIdx.x % 32 == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    shared.init_barriers();
    fence_barrier_init();
  }
  const int present = slabs(p.head_dim);
  zero_absent_slabs<64, kD>(shared.k, 2 + 2 * kStages, present, threadIdx.x, Config::kThreads);
  fence_proxy_async();
  __syncthreads();
  launch_dependents();

  if (warp < 4) {
    registers_shrink<Config::kProducerRegisters>();
    if (warp == 0 && elect_one()) produce_wide_operands<Config>(shared, p, maps, present);
  } else {
    registers_grow<Config::kConsumerRegisters>();
    wait_for_dependencies();
    WideConsumer<Config>(shared, base, p, warp < 8).run(present);
  }
}

}  // namespace seal::sm90
