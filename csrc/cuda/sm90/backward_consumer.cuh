// The consuming side of the backward's main kernel: two warpgroups with 64 keys of the tile each.
#pragma once

#include "backward_config.cuh"

namespace seal::sm90 {

// Walks through the query tiles that see the keys, for each query head of the task in turn, and then once more for the heads that
// need an exact dscale. One step, of the ring's stage s, by each of the two warpgroups:
//
//   waits for                         does                                        lets go of
//   q_full[s]                         issues S = K Q^T
//   do_full[s]                        issues dP = V dO^T
//   S                                 mask, P = exp2(S - lse), packed
//   dP                                dS = P (dP - delta), packed
//   the other warpgroup's step        dS to ds[step % 2]
//     before (wait_for_other)         issues dV += P dO
//                                     issues dQ = dS K of the step before
//                                     issues dK += dS Q
//   dV                                                                            do_empty[s]
//   dQ                                                                            the step, to the other (tell_other)
//   dq_empty (the dQ before           dQ to shared memory                         dq_full
//     has left)
//   dK                                                                            q_empty[s]
//
// dQ is of the step before. With dQ of the same step both warpgroups would meet once a step, and then do the same at the same time:
// exponentials without products, products without exponentials. In a task's first step the second warpgroup starts when the first
// has S and dP. From there on it is half a step behind.
//
// tell_other() says two things: dS of this step is written, and dQ of the step before is made. The first is what the other's next
// dQ reads. The second frees the buffer that the other's next dS goes to. The first step makes no dQ; last_dq() makes the last one.
template <class Config>
class BackwardConsumer {
  using T = typename Config::T;
  using Shared = BackwardShared<Config>;
  using Task = typename Shared::Task;
  static constexpr int kD = Config::kHeadDim, kM = Config::kBlockM, kN = Config::kBlockN, kStages = Config::kStages;
  // Row vectors read before the wait for the product they belong to: registers allow all or none.
  static constexpr bool kVectorsAhead = kM == 64;
  template <BackwardWork kPart>
  using Part = std::integral_constant<BackwardWork, kPart>;
  using KeyRows = Operand<Major::kK, kN>;
  using KeyColumns = Operand<Major::kMN, kN>;

 public:
  SEAL_DEVICE BackwardConsumer(Shared& shared, uint32_t base, const BackwardKernelParams& p)
      : shared_(shared), p_(p), base_(base), group_(uniform_register(threadIdx.x) / 128 - 1),
        thread_(__shfl_sync(0xffffffffu, threadIdx.x, threadIdx.x % 32) - 128), lane_(threadIdx.x % 32) {}

  SEAL_DEVICE void run() {
    for (int count = 0;; ++count) {
      const int slot = stage_of<2>(count);
      barrier_wait(&shared_.task_full[slot], phase_of<2>(count));
      const Task& task = shared_.task[slot];
      if (!task.any) break;
      const int steps = steps_of<Config>(p_, task), exact_steps = task.exact_steps();
      clear(dk_);
      clear(dv_);
      if constexpr (Config::kWork != BackwardWork::kScale) {
        if (steps > 0) walk(Part<Config::kWork>(), task, step_ + steps);
        if (steps > 0 && exact_steps == 0) release_keys();
        store(task);
        clear(dv_);
      }
      if (exact_steps > 0) {
        walk(Part<BackwardWork::kScale>(), task, step_ + exact_steps);
        release_keys();
      } else {
        clear_exact_dscale<kD>(p_, task, index(), Config::kConsumerThreads);
      }
      __syncwarp();
      release(&shared_.task_empty[slot]);
    }
  }

 private:
  // The accumulators leave few registers: what a thread derives from its index is derived again where it is needed. The index
  // itself comes through a shuffle (constructor): ptxas would read the special register again in every step, before the step's
  // first product.
  SEAL_DEVICE uint32_t index() const {
    uint32_t thread = thread_;
    asm volatile("" : "+r"(thread));
    return thread;
  }
  static SEAL_DEVICE uint32_t row_of(uint32_t thread) { return thread / 32 * 16 + thread % 32 / 4; }  // of the key tile; and row + 8

  static SEAL_DEVICE void clear(float (&accumulator)[kD / 2]) {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) accumulator[i] = 0.f;
  }

  static SEAL_DEVICE void meet() { named_sync(kBarrierConsumers, Config::kConsumerThreads); }

  // ---- buffers

  SEAL_DEVICE void release(uint64_t* empty) const {
    if (lane_ == 0) barrier_arrive(empty);
  }
  SEAL_DEVICE void release_keys() {
    release(&shared_.k_empty);
    release(&shared_.v_empty);
    keys_phase_ ^= 1;
  }

  SEAL_DEVICE uint32_t queries_at(int stage) const { return base_ + Shared::kOffsetQ + stage * Config::kBytesQ; }
  SEAL_DEVICE uint32_t grad_out_at(int stage) const { return base_ + Shared::kOffsetGradOut + stage * Config::kBytesQ; }
  SEAL_DEVICE uint32_t ds_at(int buffer) const { return base_ + Shared::kOffsetDs + buffer * Config::kBytesDs; }
  // The queries of dS that this warpgroup makes dQ of: half of them, or all.
  SEAL_DEVICE Operand<Major::kK, kM> ds_queries(uint32_t ds) const {
    return Operand<Major::kK, kM>::at_uniform(ds + (Config::kSplitRows ? group_ * 64 * kSlabRowBytes : 0));
  }

  // dS^T of the warpgroup's keys to shared memory, as [queries][keys].
  SEAL_DEVICE void give_ds(uint32_t ds, const uint32_t (&ds_rows)[kM / 4], uint32_t thread) const {
    // The lane's row of matrix lane / 8 of a k16 step is query 16 t + lane / 16 * 8 + lane % 8.
    const uint32_t query = thread % 32 / 16 * 8 + thread % 8, chunk = thread / 32 % 4 * 2 + thread / 8 % 2;
#pragma unroll
    for (int t = 0; t < kM / 16; ++t) {
      stmatrix_transposed(ds + group_ * (kM * kSlabRowBytes) + swizzled(query, chunk) + t * 16 * kSlabRowBytes, ds_rows[4 * t],
                          ds_rows[4 * t + 1], ds_rows[4 * t + 2], ds_rows[4 * t + 3]);
    }
  }

  // A step's dQ to the warp that adds it, once dq_empty says so.
  SEAL_DEVICE void give_dq(const float (&dq)[Config::kDqFloats], uint32_t thread) {
    dq_phase_ ^= 1;
    float* const to = &shared_.dq[group_][thread % 128 / 32 * (Config::kDqFloats * 32) + thread % 32 * 4];
#pragma unroll
    for (int i = 0; i < Config::kDqFloats / 4; ++i) {
      *reinterpret_cast<float4*>(to + i * 128) = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
    __syncwarp();
    release(&shared_.dq_full[group_]);
  }
  SEAL_DEVICE bool dq_is_free() const { return barrier_peek(&shared_.dq_empty[group_], dq_phase_ ^ 1); }
  SEAL_DEVICE void wait_for_free_dq() const { barrier_wait(&shared_.dq_empty[group_], dq_phase_ ^ 1); }

  // ---- products. They are transposed where P and dS are A operands in registers; `rows` holds those.

  // S^T or dP^T of a step's 64 keys.
  SEAL_DEVICE void multiply_rows(float (&scores)[kM / 2], KeyRows keys, uint32_t queries) const {
    wgmma_fence();
    product<T, kD>(scores, keys, Operand<Major::kK, kM>::at_uniform(queries), false);
    wgmma_commit();
  }
  // dV or dK += P^T dO or dS^T Q.
  SEAL_DEVICE void accumulate(float (&accumulator)[kD / 2], const uint32_t (&rows)[kM / 4], uint32_t queries) const {
    wgmma_fence();
    product<T, Major::kMN, kM>(accumulator, rows, Operand<Major::kMN, kM>::at_uniform(queries), true);
    wgmma_commit();
  }
  SEAL_DEVICE void multiply_dq(float (&dq)[Config::kDqFloats], uint32_t ds, KeyColumns keys) const {
    wgmma_fence();
    product<T, kN>(dq, ds_queries(ds), keys, false);
    wgmma_commit();
  }

  // P (dP - delta), in the place of dP.
  static SEAL_DEVICE void make_ds(float (&dp)[kM / 2], const float (&p)[kM / 2], const float2 (&delta)[kM / 8]) {
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta[j].x : delta[j].y));
    }
  }

  // The keys' columns that this warpgroup makes dQ of. Made anew in every step: there is no register to keep it in.
  SEAL_DEVICE KeyColumns dq_columns() const {
    uint32_t columns = Config::kSplitRows ? 0 : group_ * Config::kDqColumns;
    asm volatile("" : "+r"(columns));
    return KeyColumns::at_uniform(base_ + columns / 64 * (kN * kSlabRowBytes) + columns % 64 * 2);
  }

  // ---- steps

  // Two barriers a warpgroup, in turn: its next step can be done before the other has waited for this one.
  SEAL_DEVICE uint32_t step_barrier(uint32_t group, int step) const { return kBarrierSteps + 2 * group + step % 2; }
  SEAL_DEVICE void tell_other(int step) const { named_arrive(step_barrier(group_, step), Config::kConsumerThreads); }
  SEAL_DEVICE void wait_for_other(int step) const { named_sync(step_barrier(group_ ^ 1, step), Config::kConsumerThreads); }

  // A step of five products; kFirst: the first of a task, without dQ. Returns whether Q of the next step was seen to have arrived.
  template <bool kFirst>
  SEAL_DEVICE bool full_step(const Task& task, int tile, bool masked, bool q_ready) {
    // Copies, so that ptxas derives the operands in each step. It would keep them for the first step and the others, and has no
    // register for that.
    uint32_t base = base_, group = group_;
    asm volatile("" : "+r"(base), "+r"(group));
    const float scale_log2 = p_.softmax_scale * kLog2e;
    const auto k_rows = KeyRows::at_uniform(base + group * 64 * kSlabRowBytes);
    const auto v_rows = KeyRows::at_uniform(base + Shared::kOffsetV + group * 64 * kSlabRowBytes);
    const int stage = stage_of<kStages>(step_);
    const uint32_t phase = phase_of<kStages>(step_), thread = index();
    const uint32_t q_at = queries_at(stage), grad_at = grad_out_at(stage);
    float s[kM / 2], dp[kM / 2];
    if (kFirst && group_ == 1) named_sync(kBarrierStart, Config::kConsumerThreads);
    if (!q_ready) barrier_wait(&shared_.q_full[stage], phase);
    float2 lse2[kM / 8];
    if constexpr (kVectorsAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
    const bool do_ready = barrier_peek(&shared_.do_full[stage], phase);
    multiply_rows(s, k_rows, q_at);
    if (!do_ready) barrier_wait(&shared_.do_full[stage], phase);
    multiply_rows(dp, v_rows, grad_at);
    wgmma_wait<1>();  // S
    fence_registers(s);
    if (masked) task.mask(p_, s, tile, row_of(thread));
    if constexpr (!kVectorsAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
    exponentiate(s, lse2, scale_log2);
    uint32_t p_rows[kM / 4];
    pack_fragment<T>(p_rows, s);
    float2 delta[kM / 8];
    if constexpr (kVectorsAhead) read_columns(delta, shared_.delta[stage], thread % 4);
    wgmma_wait<0>();  // dP
    fence_registers(dp);
    if (kFirst && group_ == 0) named_arrive(kBarrierStart, Config::kConsumerThreads);
    if constexpr (!kVectorsAhead) read_columns(delta, shared_.delta[stage], thread % 4);
    make_ds(dp, s, delta);
    uint32_t ds_rows[kM / 4];
    pack_fragment<T>(ds_rows, dp);
    if constexpr (!kFirst) wait_for_other(step_ - 1);
    give_ds(ds_at(step_ % 2), ds_rows, thread);
    accumulate(dv_, p_rows, grad_at);
    fence_proxy_async();
    [[maybe_unused]] float dq[Config::kDqFloats];
    if constexpr (!kFirst) multiply_dq(dq, ds_at((step_ + 1) % 2), dq_columns());
    accumulate(dk_, ds_rows, q_at);
    wgmma_wait<kFirst ? 1 : 2>();  // dV
    release(&shared_.do_empty[stage]);
    const bool next_q_ready = barrier_peek(&shared_.q_full[stage_of<kStages>(step_ + 1)], phase_of<kStages>(step_ + 1));
    if constexpr (kFirst) {
      tell_other(step_);
    } else {
      const bool dq_free = dq_is_free();
      wgmma_wait<1>();  // dQ
      fence_registers(dq);
      tell_other(step_);
      if (!dq_free) wait_for_free_dq();
      give_dq(dq, thread);
    }
    wgmma_wait<0>();  // dK
    fence_registers(dk_);
    release(&shared_.q_empty[stage]);
    return next_q_ready;
  }

  // A step in which none of this warpgroup's keys is seen, not the first of a task: its dS is zero, and dQ of the step before is all
  // there is to make.
  SEAL_DEVICE void light_step() {
    const int stage = stage_of<kStages>(step_);
    const uint32_t phase = phase_of<kStages>(step_), thread = index();
    const uint32_t nothing[kM / 4] = {};
    barrier_wait(&shared_.q_full[stage], phase);
    release(&shared_.q_empty[stage]);
    barrier_wait(&shared_.do_full[stage], phase);
    release(&shared_.do_empty[stage]);
    wait_for_other(step_ - 1);
    give_ds(ds_at(step_ % 2), nothing, thread);
    fence_proxy_async();
    float dq[Config::kDqFloats];
    multiply_dq(dq, ds_at((step_ + 1) % 2), dq_columns());
    wgmma_wait<0>();
    fence_registers(dq);
    tell_other(step_);
    wait_for_free_dq();
    give_dq(dq, thread);
  }

  // Behind a task's last step: its dQ.
  SEAL_DEVICE void last_dq() {
    wait_for_other(step_ - 1);
    float dq[Config::kDqFloats];
    multiply_dq(dq, ds_at((step_ + 1) % 2), dq_columns());
    wgmma_wait<0>();
    fence_registers(dq);
    wait_for_free_dq();
    give_dq(dq, index());
  }

  // Steps up to `last` (excluded), all products.
  SEAL_DEVICE void walk(Part<BackwardWork::kAll>, const Task& task, int last) {
    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    const int whole_begin = uniform_register(task.whole_begin), whole_end = uniform_register(task.whole_end);
    // Query tiles before light_end see none of this warpgroup's keys.
    const int light_end = uniform_register(task.first_seen_by(p_, 64 * group_));

    barrier_wait(&shared_.k_full, keys_phase_);
    barrier_wait(&shared_.v_full, keys_phase_);
    bool q_ready = false;  // Q of the step was seen to have arrived
    int place = begin;
    const auto step = [&](auto first) {
      constexpr bool kFirst = decltype(first)::value;
      const int tile = query_tile<kD>(begin, end, place);
      if (++place == end) place = begin;
      if (!kFirst && tile < light_end) {
        light_step();
        q_ready = false;
      } else {
        q_ready = full_step<kFirst>(task, tile, tile < whole_begin || tile >= whole_end, q_ready);
      }
      ++step_;
    };
    step(std::true_type());
#pragma unroll 1
    while (step_ != last) step(std::false_type());
    last_dq();
    fence_registers(dv_);
  }

  // The same without dQ; with kScale those of the exact heads.
  template <BackwardWork kPart>
  SEAL_DEVICE void walk(Part<kPart>, const Task& task, int last) {
    constexpr bool kValueOnly = kPart == BackwardWork::kValue || kPart == BackwardWork::kScale;
    const float scale_log2 = p_.softmax_scale * kLog2e;
    const auto k_rows = KeyRows::at_uniform(base_ + group_ * 64 * kSlabRowBytes);
    const auto v_rows = KeyRows::at_uniform(base_ + Shared::kOffsetV + group_ * 64 * kSlabRowBytes);
    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    const int whole_begin = uniform_register(task.whole_begin), whole_end = uniform_register(task.whole_end);

    barrier_wait(&shared_.k_full, keys_phase_);
    barrier_wait(&shared_.v_full, keys_phase_);
    bool q_ready = false;  // Q of the step was seen to have arrived
    int place = begin;
    [[maybe_unused]] int head = kPart == BackwardWork::kScale ? task.first_exact_head() : 0;
    for (;; ++step_) {
      const int stage = stage_of<kStages>(step_);
      const uint32_t phase = phase_of<kStages>(step_), thread = index();
      const uint32_t q_at = queries_at(stage), grad_at = grad_out_at(stage);
      float s[kM / 2], dp[kM / 2];
      if (!q_ready) barrier_wait(&shared_.q_full[stage], phase);
      float2 lse2[kM / 8];
      if constexpr (kVectorsAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
      const bool do_ready = barrier_peek(&shared_.do_full[stage], phase);
      multiply_rows(s, k_rows, q_at);
      if (!do_ready) barrier_wait(&shared_.do_full[stage], phase);
      if constexpr (!kValueOnly) multiply_rows(dp, v_rows, grad_at);
      wgmma_wait<kValueOnly ? 0 : 1>();  // S
      fence_registers(s);
      const int tile = query_tile<kD>(begin, end, place);
      if (tile < whole_begin || tile >= whole_end) task.mask(p_, s, tile, row_of(thread));
      if constexpr (!kVectorsAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
      exponentiate(s, lse2, scale_log2);
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      if constexpr (kValueOnly) {
        __syncwarp();
        release(&shared_.q_empty[stage]);
        accumulate(dv_, p_rows, grad_at);
        wgmma_wait<0>();
        release(&shared_.do_empty[stage]);
      } else {
        float2 delta[kM / 8];
        if constexpr (kVectorsAhead) read_columns(delta, shared_.delta[stage], thread % 4);
        wgmma_wait<0>();  // dP
        fence_registers(dp);
        if constexpr (!kVectorsAhead) read_columns(delta, shared_.delta[stage], thread % 4);
        make_ds(dp, s, delta);
        uint32_t ds_rows[kM / 4];
        pack_fragment<T>(ds_rows, dp);
        accumulate(dv_, p_rows, grad_at);
        accumulate(dk_, ds_rows, q_at);
        q_ready = barrier_peek(&shared_.q_full[stage_of<kStages>(step_ + 1)], phase_of<kStages>(step_ + 1));
        wgmma_wait<1>();  // dV
        release(&shared_.do_empty[stage]);
        wgmma_wait<0>();  // dK
        fence_registers(dk_);
        release(&shared_.q_empty[stage]);
      }
      if (++place == end) {
        place = begin;
        if constexpr (kPart == BackwardWork::kScale) {
          fence_registers(dv_);
          sum_columns<T, kD, kN, Config::kConsumerWarps>(p_, shared_.v, reinterpret_cast<float*>(shared_.ds), task.tile, head, dv_, kBarrierConsumers);
          head = task.next_exact_head(head);
          clear(dv_);
        }
      }
      if (step_ == last - 1) break;
    }
    ++step_;
    fence_registers(dv_);
  }

  // ---- the results

  SEAL_DEVICE void store(const Task& task) {
    meet();  // both warpgroups are done with dS
    if (p_.splits > 1) {
      store_partial(task, dk_, p_.dk_partial);
      store_partial(task, dv_, p_.dv_partial);
      return;
    }
    if (p_.grad_v != nullptr) store_tile(task, dv_, p_.grad_v, 1.f, false);
    if (Config::kWork != BackwardWork::kValue && p_.grad_k != nullptr) store_tile(task, dk_, p_.grad_k, p_.softmax_scale, p_.cos != nullptr);
    meet();  // nobody still reads what the next tile's dS is written over
  }

  SEAL_DEVICE void store_partial(const Task& task, const float (&accumulator)[kD / 2], float* partial) const {
    if (partial == nullptr) return;
    const int64_t at = ((static_cast<int64_t>(task.split) * p_.heads_k + task.head_k) * p_.tile_count_k + task.tile) * kN * kD +
                       (index() / 32 * (kD / 8) * 32 + lane_) * 4;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      *reinterpret_cast<float4*>(partial + at + j * 128) =
          make_float4(accumulator[4 * j], accumulator[4 * j + 1], accumulator[4 * j + 2], accumulator[4 * j + 3]);
    }
  }

  SEAL_DEVICE void store_tile(const Task& task, const float (&accumulator)[kD / 2], void* output, float factor, bool rotate) {
    constexpr int kRows = Config::kStagedRows;
    const int warp = index() / 32;
    float* const staging = shared_.staging(warp);
    if constexpr (Shared::kStagesInDq) {
      if (warp == Config::kConsumerWarps - 1) barrier_wait(&shared_.dq_empty[0], dq_phase_ ^ 1);  // the last dQ has been read
    }
#pragma unroll
    for (int part = 0; part < 16 / kRows; ++part) {
      stage_rows<kD, kRows / 8>(staging, accumulator, part, lane_);
      __syncwarp();
      const int row = task.first_key + warp * 16 + part * kRows;
      store_rows<T, kD>(p_, staging, min(kRows, task.seq.length_k - row), output, task.seq.first_k + row, task.batch_row, p_.seqlen_k,
                        task.head_k, p_.heads_k, factor, rotate, p_.positions_k);
      __syncwarp();
    }
  }

  Shared& shared_;
  const BackwardKernelParams& p_;
  const uint32_t base_;   // address of shared_
  const uint32_t group_;  // which 64 keys
  const uint32_t thread_;  // of the consumers
  const int lane_;
  int step_ = 0;  // of all tiles
  uint32_t keys_phase_ = 0, dq_phase_ = 0;

  float dk_[kD / 2], dv_[kD / 2];
};

}  // namespace seal::sm90
