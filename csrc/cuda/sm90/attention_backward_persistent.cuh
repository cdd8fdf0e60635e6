// Main kernel of the attention backward, head_dim up to 128: a thread block on every multiprocessor takes tiles of 128 keys of
// a key/value head, one after the other, and walks through the query tiles that see them, for each of its query heads in turn,
// so that dK and dV stay in registers.
//
// Warpgroup 0 supplies: warp 0 runs the copy engine, warp 1 picks tiles, warps 2 and 3 add dQ to global memory.
// Warpgroups 1 and 2 consume, 64 keys each. A step, kBlockM queries, is five products:
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dQ = dS K    dK += dS^T Q
// S^T and dP^T are computed transposed, so that P^T and dS^T are A operands in registers; only dQ needs dS in shared memory,
// where the two warpgroups meet once a step. dQ leaves through shared memory by bulk reductions: added from registers, the
// consuming warps would wait for memory at their next fence. dK and dV leave through the shared memory of dS, while the copy
// engine fills that of K, V, Q and dO for the next tile.
//
// A scale needs nothing here: dO is then scale * g (attention_backward_rows.cuh). Heads whose dscale must be exact are walked
// through once more after the epilogue: P^T g of each, and the column sums of V * (P^T g).
#pragma once

#include "attention_backward_main.cuh"

namespace seal::sm90 {

template <class T_, int kHeadDim_, BackwardWork kWork_>
struct BackwardConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;  // of the shared-memory tiles; the tensors' may be smaller
  static constexpr BackwardWork kWork = kWork_;
  static constexpr int kBlockM = kHeadDim == 64 ? 128 : 64, kBlockN = kTileRows;
  static constexpr int kStages = 2;     // of Q with lse2, of dO with delta
  static constexpr int kDsBuffers = 2;
  static constexpr int kThreads = 384, kConsumerThreads = 256, kConsumerWarps = 8;
  // 65,536 registers: 24 + 2 * 240 for each of 128 lanes of a warpgroup.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // dQ of a step, 64 rows a warpgroup: of 128 queries each takes half, of 64 each takes half of the channels.
  static constexpr bool kSplitRows = kBlockM == 128;
  static constexpr int kDqColumns = kSplitRows ? kHeadDim : kHeadDim / 2, kDqFloats = 64 * kDqColumns / 128;
  static constexpr int kBytesKv = tile_bytes(kBlockN, kHeadDim), kBytesQ = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kBytesDs = tile_bytes(kBlockM, kBlockN);
  // Rows of dK or dV that a warp stages at a time.
  static constexpr int kStagedRows = kDsBuffers * kBytesDs >= kBlockN * (kHeadDim + kPad) * 4 ? 16 : 8;
};

template <class Config>
struct PersistentShared {
  using Task = BackwardTask<Config::kBlockM>;
  static constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM;

  char k[Config::kBytesKv], v[Config::kBytesKv];
  char q[kStages][Config::kBytesQ], grad_out[kStages][Config::kBytesQ];
  char ds[Config::kDsBuffers][Config::kBytesDs];     // [queries][keys]; between the tiles: dK and dV on their way out
  float dq[2][kBlockM * Config::kHeadDim / 2];       // a step's dQ on its way to global memory, each warpgroup's half in accumulator order
  Task task[2];
  int counts[6];  // of the roles that have no register left for them
  alignas(16) float lse2[kStages][kBlockM], delta[kStages][kBlockM];  // filled by bulk copies
  uint64_t task_full[2], task_empty[2], task_wanted;
  uint64_t k_full, k_empty, v_full, v_empty;
  uint64_t q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages], dq_full[2], dq_empty[2];

  // Where a consumer warp stages rows of dK or dV. At head_dim 128 the last warp's place reaches into dq.
  SEAL_DEVICE float* staging(int warp) { return reinterpret_cast<float*>(ds) + warp * Config::kStagedRows * (Config::kHeadDim + kPad); }
  static constexpr bool kStagesInDq = Config::kConsumerWarps * Config::kStagedRows * (Config::kHeadDim + kPad) * 4 > sizeof(ds);
  static_assert(Config::kConsumerWarps * Config::kStagedRows * (Config::kHeadDim + kPad) * 4 <= sizeof(ds) + sizeof(dq[0]));

  static constexpr uint32_t kOffsetV = Config::kBytesKv, kOffsetQ = 2 * Config::kBytesKv;
  static constexpr uint32_t kOffsetGradOut = kOffsetQ + kStages * Config::kBytesQ, kOffsetDs = kOffsetGradOut + kStages * Config::kBytesQ;
  static constexpr uint32_t kOffsetDq = kOffsetDs + Config::kDsBuffers * Config::kBytesDs;
  static_assert(sizeof(ds) >= Config::kBytesKv && sizeof(dq) >= Config::kBytesKv, "room for dV and dK on their way out");
};

// Steps of a task: those of all its heads, and those of its exact heads once more.
template <class Config>
SEAL_DEVICE int steps_of(const BackwardKernelParams& p, const typename PersistentShared<Config>::Task& task) {
  return Config::kWork == BackwardWork::kScale ? 0 : (task.end - task.begin) * p.heads_per_cta;
}

// ---- the supplying side

// Warp 1: picks tiles, the first by the number of the thread block, the others through the counter, as late as they can wait.
template <class Config>
SEAL_DEVICE void produce_tasks(PersistentShared<Config>& shared, const BackwardKernelParams& p) {
  const bool writes = threadIdx.x % 32 == 0;
  volatile int &count = shared.counts[0], &block = shared.counts[3];
  if (writes) count = 0, block = blockIdx.x;
  __syncwarp();
#pragma unroll 1
  while (true) {
    const int slot = stage_of<2>(count);
    auto& task = shared.task[slot];
    const bool any = block < p.task_count;
    barrier_wait(&shared.task_empty[slot], phase_of<2>(count) ^ 1);
    if (any) {
      task.find(p, block, writes);
      task.find_exact_heads(p, writes);
    }
    if (writes) {
      task.any = any;
      barrier_arrive(&shared.task_full[slot]);
    }
    if (!any) return;
    barrier_wait(&shared.task_wanted, count & 1);
    __syncwarp();  // all lanes have read `count`
    if (writes) {
      block = atomicAdd(p.task_counter, 1) + static_cast<int>(gridDim.x);
      count = count + 1;
    }
    __syncwarp();
  }
}

// One thread of warp 0: of each task K and V, then step by step Q with lse2 and dO with delta; then the steps of the exact heads
// with the unscaled dO.
template <class Config>
SEAL_DEVICE void produce_operands(PersistentShared<Config>& shared, const BackwardKernelParams& p, const BackwardMaps& maps) {
  constexpr int kStages = Config::kStages, kM = Config::kBlockM, kN = Config::kBlockN, kD = Config::kHeadDim;
  const bool packed = p.cu_seqlens_k != nullptr;
  const uint64_t keep = policy_evict_last();
  volatile int &count = shared.counts[1], &keys_count = shared.counts[2];
  int step = 0;
  count = keys_count = 0;
#pragma unroll 1
  while (true) {
    const int slot = stage_of<2>(count);
    barrier_wait(&shared.task_full[slot], phase_of<2>(count));
    const auto& task = shared.task[slot];
    if (!task.any) return;
    const auto load_keys = [&](char* to, const CUtensorMap* map, uint64_t* full, uint64_t* empty) {
      const RowCoordinates rows(packed, kN, task.first_key, task.seq.length_k, packed ? task.seq.first_k : task.batch_row);
      barrier_wait(empty, (keys_count & 1) ^ 1);
      barrier_expect_bytes(full, Config::kBytesKv);
      tma_load_tile<kN, kD>(to, map, full, task.head_k, rows, keep);
    };
    const auto load_step = [&](int head, int m, const CUtensorMap* grad_out) {
      const int stage = stage_of<kStages>(step);
      const RowCoordinates rows(packed, kM, m * kM, task.seq.length_q, packed ? task.seq.first_q : task.batch_row);
      const auto load = [&](char* to, float* to_vector, const CUtensorMap* map, const float* vector, uint64_t* full, uint64_t* empty) {
        barrier_wait(empty, phase_of<kStages>(step) ^ 1);
        barrier_expect_bytes(full, Config::kBytesQ + kM * 4);
        tma_load_tile<kM, kD>(to, map, full, head, rows, keep);
        bulk_load(to_vector, vector + head * p.padded_rows_q + task.seq.padded_q + m * kM, kM * 4, full);
      };
      load(shared.q[stage], shared.lse2[stage], &maps.q, p.lse2, &shared.q_full[stage], &shared.q_empty[stage]);
      load(shared.grad_out[stage], shared.delta[stage], grad_out, p.delta, &shared.do_full[stage], &shared.do_empty[stage]);
      ++step;
    };
    const int steps = steps_of<Config>(p, task);
    if (steps > 0 || task.exact_steps() > 0) {
      load_keys(shared.k, &maps.k, &shared.k_full, &shared.k_empty);
      load_keys(shared.v, &maps.v, &shared.v_full, &shared.v_empty);
      keys_count = keys_count + 1;
    }
#pragma unroll 1
    for (int i = 0, head = task.first_head, m = task.begin; i < steps; ++i) {
      load_step(head, turn<kD>(task.begin, task.end, m), &maps.grad_out);
      if (++m == task.end) m = task.begin, ++head;
    }
#pragma unroll 1
    for (int i = task.exact_steps(), head = task.first_exact_head(), m = task.begin; i > 0; --i) {
      load_step(head, turn<kD>(task.begin, task.end, m), &maps.unscaled_grad_out);
      if (++m == task.end) m = task.begin, head = task.next_exact_head(head);
    }
    // The consumers are two steps and an epilogue behind.
    barrier_arrive(&shared.task_wanted);
    barrier_arrive(&shared.task_empty[stage_of<2>(count)]);
    count = count + 1;
  }
}

// One thread of warp 2 or 3: dQ of one warpgroup. The fence on this side of the barrier orders its shared-memory writes before the
// reduction; on the other side all consumers would wait for it.
template <class Config>
SEAL_DEVICE void add_queries(PersistentShared<Config>& shared, const BackwardKernelParams& p, int group) {
  constexpr int kM = Config::kBlockM, kD = Config::kHeadDim;
  const uint64_t keep = policy_evict_last();
  volatile int& count = shared.counts[4 + group];
  uint32_t phase = 0;
  for (count = 0;; count = count + 1) {
    const int slot = stage_of<2>(count);
    barrier_wait(&shared.task_full[slot], phase_of<2>(count));
    const auto& task = shared.task[slot];
    if (!task.any) break;
    int64_t first_tile = (task.first_head * p.padded_rows_q + task.seq.padded_q) / kM;  // of the head, in the padded space
    int m = task.begin;
    for (int i = steps_of<Config>(p, task); i > 0; --i) {
      const int tile = turn<kD>(task.begin, task.end, m);
      int32_t* const turns = p.turns + 2 * (first_tile + tile) + group;
      if (kOrdered && p.turns != nullptr) {
        // Of the tiles of keys that see these queries, those before this one have added their dQ.
        const int first = p.window_left < 0 ? 0 : max(0, tile * kM + task.seq.shift() - p.window_left) / Config::kBlockN;
        wait_for_count(turns, task.first_key / Config::kBlockN - first);
        fence_proxy_async_global();
      }
      barrier_wait(&shared.dq_full[group], phase);
      phase ^= 1;
      fence_proxy_async();
      bulk_reduce_add(p.dq + (first_tile + tile) * (kM * kD) + group * (kM * kD / 2), shared.dq[group], kM * kD * 2, keep);
      bulk_commit();
      bulk_wait_read();
      barrier_arrive(&shared.dq_empty[group]);
      if (kOrdered && p.turns != nullptr) {
        bulk_wait();
        fence_proxy_async_global();
        count_up(turns);
      }
      if (++m == task.end) {
        m = task.begin;
        first_tile += p.padded_rows_q / kM;
      }
    }
    barrier_arrive(&shared.task_empty[stage_of<2>(count)]);
  }
  bulk_wait();
}

// ---- the computing side

template <class Config>
class BackwardConsumer {
  using T = typename Config::T;
  using Shared = PersistentShared<Config>;
  using Task = typename Shared::Task;
  static constexpr int kD = Config::kHeadDim, kM = Config::kBlockM, kN = Config::kBlockN, kStages = Config::kStages;
  template <BackwardWork kPart>
  using Part = std::integral_constant<BackwardWork, kPart>;

 public:
  SEAL_DEVICE BackwardConsumer(Shared& shared, uint32_t base, const BackwardKernelParams& p, const BackwardMaps& maps)
      : shared_(shared), p_(p), maps_(maps), base_(base), group_(uniform_register(threadIdx.x) / 128 - 1), lane_(threadIdx.x % 32) {}

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
        wait_for_leaving();
        walk(Part<BackwardWork::kScale>(), task, step_ + exact_steps);
        release_keys();
      } else {
        clear_exact_dscale<kD>(p_, task, index(), Config::kConsumerThreads);
      }
      __syncwarp();
      release(&shared_.task_empty[slot]);
    }
    if (kCopyOut && lane_ == 0) bulk_wait();
  }

 private:
  // The accumulators leave few registers: what a thread derives from its index is derived again where it is needed.
  static SEAL_DEVICE uint32_t index() {
    uint32_t thread = threadIdx.x - 128;
    asm volatile("" : "+r"(thread));
    return thread;
  }
  static SEAL_DEVICE uint32_t row_of(uint32_t thread) { return thread / 32 * 16 + thread % 32 / 4; }  // of the key tile; and row + 8

  static SEAL_DEVICE void clear(float (&accumulator)[kD / 2]) {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) accumulator[i] = 0.f;
  }

  static SEAL_DEVICE void meet() { named_sync(kBarrierConsumers, Config::kConsumerThreads); }

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

  // A step in which none of this warpgroup's keys is seen: nothing but its share of dQ, from the other's dS.
  template <class Columns>
  SEAL_DEVICE void light_step(Columns k_columns) {
    const int stage = stage_of<kStages>(step_);
    const uint32_t phase = phase_of<kStages>(step_), thread = index(), ds = ds_at(step_ % 2);
    const uint32_t nothing[kM / 4] = {};
    wait_for_leaving();
    give_ds(ds, nothing, thread);
    barrier_wait(&shared_.q_full[stage], phase);
    release(&shared_.q_empty[stage]);
    barrier_wait(&shared_.do_full[stage], phase);
    release(&shared_.do_empty[stage]);
    fence_proxy_async();
    meet();
    float dq[Config::kDqFloats];
    wgmma_fence();
    product<T, kN>(dq, Operand<Major::kK, kM>::at_uniform(ds + (Config::kSplitRows ? group_ * 64 * kSlabRowBytes : 0)), k_columns, false);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(dq);
    barrier_wait(&shared_.dq_empty[group_], dq_phase_ ^ 1);
    give_dq(dq, thread);
  }

  // Steps up to `last` (excluded) as parts of kPart; with kScale those of the exact heads.
  template <BackwardWork kPart>
  SEAL_DEVICE void walk(Part<kPart>, const Task& task, int last) {
    constexpr bool kValueOnly = kPart == BackwardWork::kValue || kPart == BackwardWork::kScale;
    constexpr bool kAhead = kM == 64;  // row vectors read before the wait for the product: registers allow all or none
    const float scale_log2 = p_.softmax_scale * kLog2e;
    const auto k_rows = Operand<Major::kK, kN>::at_uniform(base_ + group_ * 64 * kSlabRowBytes);
    const auto v_rows = Operand<Major::kK, kN>::at_uniform(base_ + Shared::kOffsetV + group_ * 64 * kSlabRowBytes);
    const uint32_t dq_columns = Config::kSplitRows ? 0 : group_ * Config::kDqColumns;
    const auto k_columns = Operand<Major::kMN, kN>::at_uniform(base_ + dq_columns / 64 * (kN * kSlabRowBytes) + dq_columns % 64 * 2);
    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    const int full_begin = uniform_register(task.full_begin), full_end = uniform_register(task.full_end);

    // Query tiles before light_end see none of this warpgroup's keys.
    const int first_key = task.first_key + 64 * static_cast<int>(group_);
    const int light = p_.window_right < 0 ? 0 : max(0, first_key - task.seq.shift() - p_.window_right) / kM;
    const int light_end = kLight ? uniform_register(first_key >= task.seq.length_k ? INT32_MAX : light) : 0;

    barrier_wait(&shared_.k_full, keys_phase_);
    barrier_wait(&shared_.v_full, keys_phase_);
    bool q_ready = false;  // Q of the step was seen to have arrived
    int m = begin;
    [[maybe_unused]] int head = kPart == BackwardWork::kScale ? task.first_exact_head() : 0;
    for (;; ++step_) {
      if (kLight && kPart == BackwardWork::kAll && turn<kD>(begin, end, m) < light_end) {
        light_step(k_columns);
        q_ready = false;
        if (++m == end) m = begin;
        if (step_ == last - 1) break;
        continue;
      }
      const int stage = stage_of<kStages>(step_);
      const uint32_t phase = phase_of<kStages>(step_), thread = index();
      const uint32_t q_at = queries_at(stage), grad_at = grad_out_at(stage);
      float s[kM / 2], dp[kM / 2];
      if (!q_ready) barrier_wait(&shared_.q_full[stage], phase);
      float2 lse2[kM / 8];
      if constexpr (kAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
      const bool do_ready = barrier_peek(&shared_.do_full[stage], phase);
      wgmma_fence();
      product<T, kD>(s, k_rows, Operand<Major::kK, kM>::at_uniform(q_at), false);
      wgmma_commit();
      if (!do_ready) barrier_wait(&shared_.do_full[stage], phase);
      if constexpr (!kValueOnly) {
        wgmma_fence();
        product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(grad_at), false);
        wgmma_commit();
      }
      wgmma_wait<kValueOnly ? 0 : 1>();
      fence_registers(s);
      const int tile_m = turn<kD>(begin, end, m);
      if (tile_m < full_begin || tile_m >= full_end) task.mask(p_, s, tile_m, task.first_key + row_of(thread));
      if constexpr (!kAhead) read_columns(lse2, shared_.lse2[stage], thread % 4);
      exponentiate(s, lse2, scale_log2);
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      const auto multiply_dv = [&] {
        wgmma_fence();
        product<T, Major::kMN, kM>(dv_, p_rows, Operand<Major::kMN, kM>::at_uniform(grad_at), true);
        wgmma_commit();
      };
      if constexpr (kValueOnly) {
        __syncwarp();
        release(&shared_.q_empty[stage]);
        multiply_dv();
        wgmma_wait<0>();
        release(&shared_.do_empty[stage]);
      } else {
        float2 delta[kM / 8];
        if constexpr (kAhead) read_columns(delta, shared_.delta[stage], thread % 4);
        wgmma_wait<0>();
        fence_registers(dp);
        if constexpr (!kAhead) read_columns(delta, shared_.delta[stage], thread % 4);
#pragma unroll
        for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta[j].x : delta[j].y));
        }
        uint32_t ds_rows[kM / 4];
        pack_fragment<T>(ds_rows, dp);
        const auto multiply_dk = [&] {
          wgmma_fence();
          product<T, Major::kMN, kM>(dk_, ds_rows, Operand<Major::kMN, kM>::at_uniform(q_at), true);
          wgmma_commit();
        };
        const auto next_q_ready = [&] { return barrier_peek(&shared_.q_full[stage_of<kStages>(step_ + 1)], phase_of<kStages>(step_ + 1)); };
        if constexpr (kPart == BackwardWork::kAll) {
          const uint32_t ds = ds_at(step_ % 2);
          wait_for_leaving();
          give_ds(ds, ds_rows, thread);
          multiply_dv();
          fence_proxy_async();
          // dQ needs dS of both warpgroups. A buffer of dS is written again two steps on, after the next barrier, which a
          // warpgroup reaches only when its dQ of this step is done.
          meet();
          float dq[Config::kDqFloats];
          wgmma_fence();
          product<T, kN>(dq, Operand<Major::kK, kM>::at_uniform(ds + (Config::kSplitRows ? group_ * 64 * kSlabRowBytes : 0)), k_columns, false);
          wgmma_commit();
          wgmma_wait<1>();  // dV
          release(&shared_.do_empty[stage]);
          multiply_dk();
          q_ready = next_q_ready();
          const bool dq_free = barrier_peek(&shared_.dq_empty[group_], dq_phase_ ^ 1);
          wgmma_wait<1>();  // dQ
          fence_registers(dq);
          if (!dq_free) barrier_wait(&shared_.dq_empty[group_], dq_phase_ ^ 1);
          give_dq(dq, thread);
        } else {
          multiply_dv();
          multiply_dk();
          q_ready = next_q_ready();
          wgmma_wait<1>();  // dV
          release(&shared_.do_empty[stage]);
        }
        wgmma_wait<0>();  // dK
        fence_registers(dk_);
        release(&shared_.q_empty[stage]);
      }
      if (++m == end) {
        m = begin;
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
    wait_for_leaving();
    meet();  // both warpgroups are done with dS
    if (p_.splits > 1) {
      store_partial(task, dk_, p_.dk_partial);
      store_partial(task, dv_, p_.dv_partial);
      return;
    }
    if (kCopyOut && p_.cos == nullptr) {
      if (p_.grad_v != nullptr) copy_out(task, dv_, Shared::kOffsetDs, &maps_.grad_v, 1.f);
      if (Config::kWork != BackwardWork::kValue && p_.grad_k != nullptr) {
        // The last dQ has been read.
        barrier_wait(&shared_.dq_empty[0], dq_phase_ ^ 1);
        barrier_wait(&shared_.dq_empty[1], dq_phase_ ^ 1);
        copy_out(task, dk_, Shared::kOffsetDq, &maps_.grad_k, p_.softmax_scale);
      }
      leaving_ = true;
      return;
    }
    if (p_.grad_v != nullptr) store_rows_of(task, dv_, p_.grad_v, 1.f, false);
    if (Config::kWork != BackwardWork::kValue && p_.grad_k != nullptr) store_rows_of(task, dk_, p_.grad_k, p_.softmax_scale, p_.cos != nullptr);
    meet();  // nobody still reads what the next tile's dS is written over
  }

  // Sends the warp's 16 rows of an accumulator, times `factor`, on their way through the shared memory at `offset`, which is laid
  // out as a tile of keys.
  SEAL_DEVICE void copy_out(const Task& task, const float (&accumulator)[kD / 2], uint32_t offset, const CUtensorMap* map, float factor) const {
    const uint32_t warp = index() / 32, start = base_ + offset + swizzled(16 * warp + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {  // 16 columns: two accumulator groups of 8
      const auto two = [&](int i) { return pack<T>(accumulator[8 * pair + i] * factor, accumulator[8 * pair + i + 1] * factor); };
      stmatrix((start ^ (pair % 4 << 5)) + pair / 4 * (kN * kSlabRowBytes), two(0), two(2), two(4), two(6));
    }
    fence_proxy_async();
    __syncwarp();
    const int row = task.first_key + 16 * warp;
    if (lane_ != 0) return;
    if (row < task.seq.length_k) {  // a box must hold a row
      const bool packed = p_.cu_seqlens_k != nullptr;
      const RowCoordinates at(packed, 16, row, task.seq.length_k, packed ? task.seq.first_k : task.batch_row);
#pragma unroll
      for (int slab = 0; slab < slabs(kD); ++slab) {
        const uint32_t from = offset + (slab * kN + 16 * warp) * kSlabRowBytes;
        tma_store(map, reinterpret_cast<const char*>(&shared_) + from, slab * kSlabColumns, task.head_k, at);
      }
    }
    bulk_commit();
  }
  // Before ds or dq are written again.
  SEAL_DEVICE void wait_for_leaving() {
    if (!kCopyOut || !leaving_) return;
    if (lane_ == 0) bulk_wait_read();
    __syncwarp();
    meet();
    leaving_ = false;
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

  SEAL_DEVICE void store_rows_of(const Task& task, const float (&accumulator)[kD / 2], void* output, float factor, bool rotate) {
    constexpr int kRows = Config::kStagedRows;
    const int warp = index() / 32;
    float* const tile = shared_.staging(warp);
    if constexpr (Shared::kStagesInDq) {
      if (warp == Config::kConsumerWarps - 1) barrier_wait(&shared_.dq_empty[0], dq_phase_ ^ 1);  // the last dQ has been read
    }
#pragma unroll
    for (int part = 0; part < 16 / kRows; ++part) {
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
        for (int h = part; h < part + kRows / 8; ++h) {
          float* const at = tile + (lane_ / 4 + 8 * (h - part)) * (kD + kPad) + 8 * j + lane_ % 4 * 2;
          *reinterpret_cast<float2*>(at) = make_float2(accumulator[4 * j + 2 * h], accumulator[4 * j + 2 * h + 1]);
        }
      }
      __syncwarp();
      const int row = task.first_key + warp * 16 + part * kRows;
      store_rows<T, kD>(p_, tile, min(kRows, task.seq.length_k - row), output, task.seq.first_k + row, task.batch_row, p_.seqlen_k,
                        task.head_k, p_.heads_k, factor, rotate, p_.positions_k);
      __syncwarp();
    }
  }

  Shared& shared_;
  const BackwardKernelParams& p_;
  const BackwardMaps& maps_;
  const uint32_t base_;   // address of shared_
  const uint32_t group_;  // which 64 keys
  const int lane_;
  int step_ = 0;              // of all tiles
  uint32_t keys_phase_ = 0, dq_phase_ = 0;
  bool leaving_ = false;  // dK and dV of the tile before may still be on their way out of ds and dq

  float dk_[kD / 2], dv_[kD / 2];
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_persistent(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = PersistentShared<Config>;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  if (warp == 0 && elect_one()) {
    constexpr int kConsumerWarps = Config::kConsumerWarps;
    constexpr bool kAll = Config::kWork == BackwardWork::kAll;
    const auto init = [](uint64_t* barriers, int count, int arrivals) {
      for (int i = 0; i < count; ++i) barrier_init(barriers + i, arrivals);
    };
    init(shared.task_full, 2, 1);
    init(shared.task_empty, 2, kConsumerWarps + 1 + (kAll ? 2 : 0));
    init(&shared.task_wanted, 1, 1);
    init(&shared.k_full, 1, 1);
    init(&shared.k_empty, 1, kConsumerWarps);
    init(&shared.v_full, 1, 1);
    init(&shared.v_empty, 1, kConsumerWarps);
    init(shared.q_full, Config::kStages, 1);
    init(shared.q_empty, Config::kStages, kConsumerWarps);
    init(shared.do_full, Config::kStages, 1);
    init(shared.do_empty, Config::kStages, kConsumerWarps);
    init(shared.dq_full, 2, 4);
    init(shared.dq_empty, 2, 1);
    fence_barrier_init();
    prefetch_map(&maps.k);
    prefetch_map(&maps.q);
    prefetch_map(&maps.v);
    prefetch_map(&maps.grad_out);
  }
  __syncthreads();
  if (kPdl) release_dependents();
  wait_for_dependencies();

  if (warp < 4) {
    registers_shrink<Config::kProducerRegisters>();
    if (warp == 1) {
      produce_tasks<Config>(shared, p);
    } else if (warp == 0) {
      if (elect_one()) produce_operands<Config>(shared, p, maps);
    } else if (Config::kWork == BackwardWork::kAll) {
      if (elect_one()) add_queries<Config>(shared, p, warp - 2);
    }
  } else {
    registers_grow<Config::kConsumerRegisters>();
    BackwardConsumer<Config>(shared, base, p, maps).run();
  }
}

}  // namespace seal::sm90
