// Main kernel of the attention backward, head_dim up to 128: one CTA owns kTileRows keys of one key/value head and walks
// through the query tiles that see them, for every query head of the group in turn, so that dK and dV stay in registers.
//
// Warpgroup 0 supplies: one warp streams K, V, Q, dO and the row vectors through TMA, two add dQ to global memory.
// Warpgroups 1 and 2 compute, 64 keys each. A step, kM queries, is five products:
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dQ = dS K    dK += dS^T Q
// S^T and dP^T are computed transposed, so that P^T and dS^T are A operands in registers; only dQ needs dS in shared memory,
// where the two warpgroups meet once a step. dQ leaves through shared memory by bulk reductions: added from registers, the
// computing warps would wait for memory at their next fence.
//
// A scale needs nothing here: dO is then scale * g (attention_backward_rows.cuh). Heads whose dscale must be exact are walked
// through once more after the epilogue: P^T g of each, and the column sums of V * (P^T g).
#pragma once

#include "backward_tasks.cuh"

namespace seal::sm90 {

// What is to be produced: dQ, dK and dV; dK and dV; dV; nothing but dscale of the heads that needs_exact_dscale() names (which
// the other launches produce as well, where it is wanted).
enum class BackwardWork { kAll, kKeyValue, kValue, kScale };

// Query tiles from the last to the first: under the causal mask the CTAs of a head then read and add to the same rows at about
// the same time, which keeps them in L2 (hd128, 32k: 37.3 ms instead of 38.5). At head_dim 64 the other order is faster.
template <int kD>
constexpr bool kDescending = kD == 128;
// The query tile in the place of `m` of [begin, end) in the order of work.
template <int kD>
SEAL_DEVICE int turn(int begin, int end, int m) { return kDescending<kD> ? begin + end - 1 - m : m; }

template <int kD, int kM>
struct BackwardShared {
  static constexpr int kStages = 2, kBuffersDs = 2;
  static constexpr int kBytesKv = tile_bytes(kTileRows, kD), kBytesQ = tile_bytes(kM, kD), kBytesDs = tile_bytes(kM, kTileRows);

  char k[kBytesKv], v[kBytesKv];
  char q[kStages][kBytesQ], grad_out[kStages][kBytesQ];
  char ds[kBuffersDs][kBytesDs];  // [queries][keys]; after the loop q .. ds: the fp32 tile of the epilogue
  float dq[2][kM * kD / 2];       // a step's dQ on its way to global memory, each warpgroup's half in accumulator order
  BackwardTask<kM> task;
  alignas(16) float lse2[kStages][kM], delta[kStages][kM];  // filled by bulk copies
  uint64_t exact_known, k_full, v_full, stages_free, q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages], dq_full[2], dq_empty[2];

  SEAL_DEVICE float* tile() { return reinterpret_cast<float*>(q); }
  SEAL_DEVICE static constexpr uint32_t offset_v() { return kBytesKv; }
  SEAL_DEVICE static constexpr uint32_t offset_q(int stage) { return 2 * kBytesKv + stage * kBytesQ; }
  SEAL_DEVICE static constexpr uint32_t offset_grad_out(int stage) { return offset_q(kStages + stage); }
  SEAL_DEVICE static constexpr uint32_t offset_ds(int buffer) { return offset_q(2 * kStages) + buffer * kBytesDs; }
  static_assert(2 * kStages * kBytesQ + kBuffersDs * kBytesDs >= kTileRows * (kD + kPad) * 4, "room for the epilogue's tile");
};

// The supplying thread: K, then step by step Q with lse2 and dO with delta, V behind the first Q; once the epilogue has left the
// stages, the steps of the exact heads with the unscaled dO. present: see tma_load_tile().
template <int kD, int kM, int kRows, class Shared>
SEAL_DEVICE void stream_tiles(const BackwardKernelParams& p, const BackwardMaps& maps, Shared& shared, int steps, int exact_steps, int present) {
  if constexpr (kLateExact) {
    if (steps == 0) {
      barrier_wait(&shared.exact_known, 0);
      exact_steps = shared.task.exact_steps();
      if (exact_steps == 0) return;
    }
  }
  constexpr int kStages = Shared::kStages;
  const auto& task = shared.task;
  const Sequence& seq = task.seq;
  const bool packed = p.cu_seqlens_k != nullptr;
  const uint64_t keep = policy_evict_last();
  const RowCoordinates key_rows(packed, kRows, task.first_key, seq.length_k, packed ? seq.first_k : task.batch_row);
  const auto load_keys = [&](char* to, const CUtensorMap* map, uint64_t* full) {
    barrier_expect_bytes(full, present * kRows * kSlabRowBytes);
    tma_load_tile<kRows, kD>(to, map, full, task.head_k, key_rows, keep, present);
  };
  load_keys(shared.k, &maps.k, &shared.k_full);
  if constexpr (kPdl) {
    load_keys(shared.v, &maps.v, &shared.v_full);
    wait_for_dependencies();  // K and V are the caller's; the vectors and scale * g come from attention_backward_rows
  }
  const auto stream = [&](int step, int head, int m, const CUtensorMap* grad_out) {
    const int stage = stage_of<kStages>(step);
    const uint32_t phase = phase_of<kStages>(step) ^ 1;
    const RowCoordinates rows(packed, kM, m * kM, seq.length_q, packed ? seq.first_q : task.batch_row);
    const int64_t row = head * p.padded_rows_q + seq.padded_q + m * kM;
    const auto load = [&](char* to, float* to_vector, const CUtensorMap* map, const float* vector, uint64_t* full, uint64_t* empty) {
      barrier_wait(empty, phase);
      barrier_expect_bytes(full, present * kM * kSlabRowBytes + kM * 4);
      tma_load_tile<kM, kD>(to, map, full, head, rows, keep, present);
      bulk_load(to_vector, vector + row, kM * 4, full);
    };
    load(shared.q[stage], shared.lse2[stage], &maps.q, p.lse2, &shared.q_full[stage], &shared.q_empty[stage]);
    if (!kPdl && step == 0) load_keys(shared.v, &maps.v, &shared.v_full);
    load(shared.grad_out[stage], shared.delta[stage], grad_out, p.delta, &shared.do_full[stage], &shared.do_empty[stage]);
  };
  int step = 0;
  for (int head = task.first_head, m = task.begin; step < steps; ++step) {
    stream(step, head, turn<kD>(task.begin, task.end, m), &maps.grad_out);
    if (++m == task.end) m = task.begin, ++head;
  }
  if constexpr (kLateExact) {
    barrier_wait(&shared.exact_known, 0);
    exact_steps = shared.task.exact_steps();
  }
  if (exact_steps > 0 && steps > 0) barrier_wait(&shared.stages_free, 0);
  for (int head = task.first_exact_head(), m = task.begin; step < steps + exact_steps; ++step) {
    stream(step, head, turn<kD>(task.begin, task.end, m), &maps.unscaled_grad_out);
    if (++m == task.end) m = task.begin, head = task.next_exact_head(head);
  }
}

// The heads with an exact dscale, found by a warp that has nothing else to do while the others begin.
template <class Shared>
SEAL_DEVICE void publish_exact_heads(const BackwardKernelParams& p, Shared& shared) {
  shared.task.find_exact_heads(p, threadIdx.x % 32 == 0);
  if (threadIdx.x % 32 == 0) barrier_arrive(&shared.exact_known);
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

// Scores to probabilities, P^T = exp2(S^T * scale_log2 - lse2) with lse2 of the columns (read_columns).
template <int kScores>
SEAL_DEVICE void exponentiate(float (&s)[kScores], const float2 (&lse2)[kScores / 4], float scale_log2) {
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[4 * j + i] = exp2_approx(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse2[j].x : lse2[j].y));
  }
}

template <class T, int kD, int kM, BackwardWork kWork>
__global__ void __launch_bounds__(384, 1)
    attention_backward_main(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = BackwardShared<kD, kM>;
  constexpr int kStages = Shared::kStages;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));

  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == 1) {
    BackwardTask<kM> task;
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
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], 8);
      barrier_init(&shared.do_full[i], 1), barrier_init(&shared.do_empty[i], 8);
    }
    for (int i = 0; i < 2; ++i) barrier_init(&shared.dq_full[i], 4), barrier_init(&shared.dq_empty[i], 1);
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (kPdl) {
    release_dependents();
  } else {
    wait_for_dependencies();
  }
  const BackwardTask<kM>& task = shared.task;
  const int steps = kWork == BackwardWork::kScale ? 0 : (task.end - task.begin) * p.heads_per_cta;
  int exact_steps = kLateExact ? 0 : task.exact_steps();

  if (warp < 4) {
    // ================ suppliers ================
    registers_shrink<24>();
    if constexpr (kLateExact) {
      if (warp == 1) publish_exact_heads(p, shared);
    }
    if ((!kLateExact && steps + exact_steps == 0) || !elect_one()) return;
    const Sequence& seq = task.seq;
    if (warp == 0) {
      stream_tiles<kD, kM, kTileRows>(p, maps, shared, steps, exact_steps, slabs(kD));
    } else if (warp >= 2 && kWork == BackwardWork::kAll) {
      if constexpr (kPdl) wait_for_dependencies();
      // dQ of one warpgroup. The fence on this side of the barrier orders its shared-memory writes before the reduction; on
      // the other side all computing threads would wait for it.
      const int group = warp - 2;
      const uint64_t keep = policy_evict_last();
      const int64_t head_floats = p.padded_rows_q * kD;
      float* out = p.dq + task.first_head * head_floats + seq.padded_q * kD + group * (kM * kD / 2);
      int m = task.begin;
      for (int step = 0; step < steps; ++step) {
        barrier_wait(&shared.dq_full[group], step & 1);
        fence_proxy_async();
        bulk_reduce_add(out + static_cast<int64_t>(turn<kD>(task.begin, task.end, m)) * (kM * kD), shared.dq[group], kM * kD * 2, keep);
        bulk_commit();
        bulk_wait_read();
        barrier_arrive(&shared.dq_empty[group]);
        if (++m == task.end) m = task.begin, out += head_floats;
      }
      bulk_wait();
    }
    return;
  }

  // ================ consumers ================
  registers_grow<240>();
  if constexpr (kPdl) wait_for_dependencies();
  const uint32_t group = uniform_register(threadIdx.x) / 128 - 1;  // which 64 keys
  // The accumulators leave few registers: what a thread derives from its index is derived again where it is needed.
  const auto index = [] {
    uint32_t thread = threadIdx.x - 128;
    asm volatile("" : "+r"(thread));
    return thread;
  };
  const auto row_of = [](uint32_t thread) { return thread / 32 * 16 + thread % 32 / 4; };  // of the key tile; and row + 8
  const auto column_of = [](uint32_t thread) { return thread % 4 * 2; };  // of 8 accumulator columns; and column + 1
  float dk[kD / 2], dv[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;

  int step = 0;
  // Steps up to `last` (excluded) as parts of `work`; with kScale those of the exact heads.
  const auto walk = [&](auto work, int last) {
    constexpr BackwardWork kPart = decltype(work)::value;
    constexpr bool kValueOnly = kPart == BackwardWork::kValue || kPart == BackwardWork::kScale;
    const float scale_log2 = p.softmax_scale * kLog2e;
    const auto k_rows = Operand<Major::kK, kTileRows>::at_uniform(base + group * 64 * kSlabRowBytes);
    const auto v_rows = Operand<Major::kK, kTileRows>::at_uniform(base + Shared::offset_v() + group * 64 * kSlabRowBytes);
    // dQ of a step, 64 rows a warpgroup: of 128 queries each takes half, of 64 each takes half of the channels.
    constexpr bool kSplitRows = kM == 128;
    constexpr int kDqColumns = kSplitRows ? kD : kD / 2, kDqFloats = 64 * kDqColumns / 128;
    const uint32_t dq_columns = kSplitRows ? 0 : group * kDqColumns;
    const auto k_columns = Operand<Major::kMN, kTileRows>::at_uniform(base + dq_columns / 64 * (kTileRows * kSlabRowBytes) + dq_columns % 64 * 2);
    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    const int full_begin = uniform_register(task.full_begin), full_end = uniform_register(task.full_end);
    constexpr bool kAhead = kM == 64;  // row vectors read before the wait for the product: registers allow all or none

    barrier_wait(&shared.k_full, 0);
    barrier_wait(&shared.v_full, 0);
    bool q_ready = false;  // Q of the step was seen to have arrived
    int m = begin;
    [[maybe_unused]] int head = kPart == BackwardWork::kScale ? task.first_exact_head() : 0;
    for (;; ++step) {
      const int stage = stage_of<kStages>(step);
      const uint32_t phase = phase_of<kStages>(step), thread = index();
      const uint32_t q_at = base + Shared::offset_q(stage), grad_at = base + Shared::offset_grad_out(stage);
      float s[kM / 2], dp[kM / 2];
      if (!q_ready) barrier_wait(&shared.q_full[stage], phase);
      float2 lse2[kM / 8];
      if constexpr (kAhead) read_columns(lse2, shared.lse2[stage], thread % 4);
      const bool do_ready = barrier_peek(&shared.do_full[stage], phase);
      wgmma_fence();
      product<T, kD>(s, k_rows, Operand<Major::kK, kM>::at_uniform(q_at), false);
      wgmma_commit();
      if (!do_ready) barrier_wait(&shared.do_full[stage], phase);
      if constexpr (!kValueOnly) {
        wgmma_fence();
        product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(grad_at), false);
        wgmma_commit();
      }
      wgmma_wait<kValueOnly ? 0 : 1>();
      fence_registers(s);
      const int tile_m = turn<kD>(begin, end, m);
      if (tile_m < full_begin || tile_m >= full_end) task.mask(p, s, tile_m, task.first_key + row_of(thread));
      if constexpr (!kAhead) read_columns(lse2, shared.lse2[stage], thread % 4);
      exponentiate(s, lse2, scale_log2);
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      const auto multiply_dv = [&] {
        wgmma_fence();
        product<T, Major::kMN, kM>(dv, p_rows, Operand<Major::kMN, kM>::at_uniform(grad_at), true);
        wgmma_commit();
      };
      if constexpr (kValueOnly) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.q_empty[stage]);
        multiply_dv();
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&shared.do_empty[stage]);
      } else {
        float2 delta[kM / 8];
        if constexpr (kAhead) read_columns(delta, shared.delta[stage], thread % 4);
        wgmma_wait<0>();
        fence_registers(dp);
        if constexpr (!kAhead) read_columns(delta, shared.delta[stage], thread % 4);
#pragma unroll
        for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta[j].x : delta[j].y));
        }
        uint32_t ds_rows[kM / 4];
        pack_fragment<T>(ds_rows, dp);
        const auto multiply_dk = [&] {
          wgmma_fence();
          product<T, Major::kMN, kM>(dk, ds_rows, Operand<Major::kMN, kM>::at_uniform(q_at), true);
          wgmma_commit();
        };
        const auto next_q_ready = [&] { return barrier_peek(&shared.q_full[stage_of<kStages>(step + 1)], phase_of<kStages>(step + 1)); };
        if constexpr (kPart == BackwardWork::kAll) {
          // The lane's row of matrix lane / 8 of a k16 step is query 16 t + lane / 16 * 8 + lane % 8.
          const uint32_t ds = base + Shared::offset_ds(step % 2);
          const uint32_t query = thread % 32 / 16 * 8 + thread % 8, chunk = thread / 32 % 4 * 2 + thread / 8 % 2;
#pragma unroll
          for (int t = 0; t < kM / 16; ++t) {
            stmatrix_transposed(ds + group * (kM * kSlabRowBytes) + swizzled(query, chunk) + t * 16 * kSlabRowBytes, ds_rows[4 * t],
                                ds_rows[4 * t + 1], ds_rows[4 * t + 2], ds_rows[4 * t + 3]);
          }
          multiply_dv();
          fence_proxy_async();
          // dQ needs dS of both warpgroups. A buffer of dS is written again two steps on, after the next barrier, which a
          // warpgroup reaches only when its dQ of this step is done.
          named_sync(1, 256);
          float dq[kDqFloats];
          wgmma_fence();
          product<T, kTileRows>(dq, Operand<Major::kK, kM>::at_uniform(ds + (kSplitRows ? group * 64 * kSlabRowBytes : 0)), k_columns, false);
          wgmma_commit();
          wgmma_wait<1>();  // dV
          if (lane == 0) barrier_arrive(&shared.do_empty[stage]);
          multiply_dk();
          q_ready = next_q_ready();
          const bool dq_free = barrier_peek(&shared.dq_empty[group], (step & 1) ^ 1);
          wgmma_wait<1>();  // dQ
          fence_registers(dq);
          if (!dq_free) barrier_wait(&shared.dq_empty[group], (step & 1) ^ 1);
          float* const to = &shared.dq[group][thread % 128 / 32 * (kDqFloats * 32) + thread % 32 * 4];
#pragma unroll
          for (int i = 0; i < kDqFloats / 4; ++i) {
            *reinterpret_cast<float4*>(to + i * 128) = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(&shared.dq_full[group]);
        } else {
          multiply_dv();
          multiply_dk();
          q_ready = next_q_ready();
          wgmma_wait<1>();  // dV
          if (lane == 0) barrier_arrive(&shared.do_empty[stage]);
        }
        wgmma_wait<0>();  // dK
        fence_registers(dk);
        if (lane == 0) barrier_arrive(&shared.q_empty[stage]);
      }
      if (++m == end) {
        m = begin;
        if constexpr (kPart == BackwardWork::kScale) {
          fence_registers(dv);
          sum_columns<T, kD, kTileRows, 8>(p, shared.v, reinterpret_cast<float*>(shared.ds), task.tile, head, dv, kBarrierConsumers);
          head = task.next_exact_head(head);
#pragma unroll
          for (int i = 0; i < kD / 2; ++i) dv[i] = 0.f;
        }
      }
      if (step == last - 1) break;
    }
    ++step;
    fence_registers(dv);
  };
  // ================ epilogue ================
  const auto store_keys = [&] {
    const uint32_t thread = index();
    if (p.splits > 1) {
      const int64_t at = ((static_cast<int64_t>(task.split) * p.heads_k + task.head_k) * p.tile_count_k + task.tile) * kTileRows * kD +
                         (thread / 32 * (kD / 8) * 32 + lane) * 4;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        const auto give = [&](float* partial, const float (&acc)[kD / 2]) {
          if (partial != nullptr) *reinterpret_cast<float4*>(partial + at + j * 128) = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        };
        give(p.dk_partial, dk);
        give(p.dv_partial, dv);
      }
      return;
    }
    named_sync(1, 256);  // both warpgroups are done with the stages
    const int first_row = thread / 32 * 16;
    float* const tile = shared.tile() + first_row * (kD + kPad);
    const auto write = [&](const float (&acc)[kD / 2], void* output, float factor, bool rotate) {
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* const at = tile + (lane / 4 + 8 * h) * (kD + kPad) + 8 * j + column_of(thread);
          *reinterpret_cast<float2*>(at) = make_float2(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
        }
      }
      __syncwarp();
      store_rows<T, kD>(p, tile, min(16, task.seq.length_k - task.first_key - first_row), output, task.seq.first_k + task.first_key + first_row,
                        task.batch_row, p.seqlen_k, task.head_k, p.heads_k, factor, rotate, p.positions_k);
      __syncwarp();
    };
    if (p.grad_v != nullptr) write(dv, p.grad_v, 1.f, false);
    if (kWork != BackwardWork::kValue && p.grad_k != nullptr) write(dk, p.grad_k, p.softmax_scale, p.cos != nullptr);
  };

  if constexpr (kWork != BackwardWork::kScale) {
    if (steps > 0) walk(std::integral_constant<BackwardWork, kWork>(), steps);
    store_keys();
    // The epilogue's writes come before the copy engine's into the same memory.
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.stages_free);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dv[i] = 0.f;
  }
  if constexpr (kLateExact) {
    barrier_wait(&shared.exact_known, 0);
    exact_steps = task.exact_steps();
  }
  if (exact_steps > 0) {
    walk(std::integral_constant<BackwardWork, BackwardWork::kScale>(), steps + exact_steps);
  } else {
    clear_exact_dscale<kD>(p, task, index(), 256);
  }
}

}  // namespace seal::sm90
