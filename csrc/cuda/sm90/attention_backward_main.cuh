// Main kernel of the attention backward, head_dim up to 128: one CTA owns kTileRows keys of one key/value head and walks
// through the query tiles that see them, for every query head of the group in turn, so that dK and dV stay in registers.
//
// Warpgroup 0 produces: warp 0 streams K, Q, dO and the row vectors through TMA, warp 1 reloads V at the end of a head.
// Warpgroups 1 and 2 consume, 64 keys each. A step, 64 queries, is five products:
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dQ = dS K    dK += dS^T Q
// S^T and dP^T are computed transposed, so that P^T and dS^T are A operands in registers; only dQ needs dS in shared memory.
// S of the next step is issued behind dV: so there are products in flight while dS is made, and while the two warpgroups wait
// for each other's dS.
//
// Scale: dP = (scale * g) V^T and dV = scale * (P^T g) per channel, so V is multiplied in shared memory once per head and
// the accumulator once per head; dscale is the column sum of V * (P^T g), V unscaled: no division, exact at scale 0.
#pragma once

#include "attention_backward_common.cuh"

namespace seal::sm90 {

// What the launch is to produce: dQ, dK and dV; dK and dV; dV (and with each dscale).
enum class BackwardWork { kAll, kKeyValue, kValue };

// What one CTA works on: a tile of kRows keys and the query tiles, kM rows each, that see it. It lives in shared memory: in
// registers it would cost what the accumulators need.
template <int kM, int kRows = kTileRows>
struct BackwardTask {
  Sequence seq;
  int batch_row, head_k, split, first_head, first_key;
  int64_t tile;          // among all tiles of keys
  int begin, end;        // query tiles
  int full_begin, full_end;  // those of them in which nothing is masked

  SEAL_DEVICE BackwardTask(const BackwardKernelParams& p) {
    const bool packed = p.cu_seqlens_k != nullptr;
    const LaunchOrder order(blockIdx.x, p.tiles_k, (packed ? 1 : p.batch) * p.heads_k * p.splits, p.section);
    split = order.pair % p.splits, head_k = order.pair / p.splits % p.heads_k, batch_row = order.pair / p.splits / p.heads_k;
    int local;
    seq = locate(p, p.cu_seqlens_k, kRows, order.tile, batch_row, &local);
    first_key = local * kRows;
    tile = packed ? order.tile : static_cast<int64_t>(batch_row) * p.tiles_k + order.tile;
    first_head = (head_k * p.splits + split) * p.heads_per_cta;

    const int last_key = min(first_key + kRows, seq.length_k) - 1, shift = seq.shift();
    const int first = p.window_right < 0 ? 0 : max(0, first_key - shift - p.window_right);
    const int last = p.window_left < 0 ? seq.length_q - 1 : min(seq.length_q - 1, last_key - shift + p.window_left);
    begin = first / kM;
    end = last_key < first_key || last < first ? begin : last / kM + 1;
    // Every key of the tile is seen from query last_key - shift - right on, up to query first_key - shift + left.
    full_begin = p.window_right < 0 ? begin : (max(0, last_key - shift - p.window_right) + kM - 1) / kM;
    full_end = p.window_left < 0 ? end : max(0, first_key - shift + p.window_left + 1) / kM;
    if (first_key + kRows > seq.length_k) full_end = full_begin;
  }
  SEAL_DEVICE int steps(const BackwardKernelParams& p) const { return (end - begin) * p.heads_per_cta; }

  // Sets scores of a transposed tile to -inf where masked; `key` is the thread's first row of the accumulator.
  SEAL_DEVICE void mask(const BackwardKernelParams& p, float (&scores)[kM / 2], int m, int key) const {
    const int column = m * kM + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = key + 8 * h - seq.shift();  // in the coordinates of the queries
      int low = p.window_right < 0 ? INT32_MIN : row - p.window_right;
      const int high = p.window_left < 0 ? INT32_MAX : row + p.window_left;
      if (key + 8 * h >= seq.length_k) low = INT32_MAX;
#pragma unroll
      for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = column + 8 * j + c;
          if (query < low || query > high) scores[4 * j + 2 * h + c] = -INFINITY;
        }
      }
    }
  }
};

template <int kD, int kM>
struct BackwardShared {
  static constexpr int kStagesQ = 4, kStagesDo = 2, kBuffersDs = 2;
  static constexpr int kBytesKv = tile_bytes(kTileRows, kD), kBytesQ = tile_bytes(kM, kD), kBytesDs = tile_bytes(kM, kTileRows);

  char k[kBytesKv], v[kBytesKv];
  char q[kStagesQ][kBytesQ], grad_out[kStagesDo][kBytesQ];  // after the loop: the fp32 tile of the epilogue
  char ds[kBuffersDs][kBytesDs];  // [queries][keys]
  BackwardTask<kM> task;
  float lse2[kStagesQ][kM], delta[kStagesDo][kM], scale[4][kD], column_sums[2][8][kD];
  uint64_t k_full, v_full, v_empty, q_full[kStagesQ], q_empty[kStagesQ], do_full[kStagesDo], do_empty[kStagesDo];

  SEAL_DEVICE float* tile() { return reinterpret_cast<float*>(q); }
  SEAL_DEVICE static constexpr uint32_t offset_q(int stage) { return 2 * kBytesKv + stage * kBytesQ; }
  SEAL_DEVICE static constexpr uint32_t offset_grad_out(int stage) { return offset_q(kStagesQ + stage); }
  SEAL_DEVICE static constexpr uint32_t offset_ds(int buffer) { return offset_grad_out(kStagesDo) + buffer * kBytesDs; }
  static_assert((kStagesQ + kStagesDo) * kBytesQ >= kTileRows * (kD + kPad) * 4, "the epilogue's tile needs the room of the stages");
};

// Where the accumulators leave room, a warpgroup keeps its rows of K and V as A operands in registers: S^T and dP^T then read
// half as much shared memory, and V is scaled in registers.
template <int kD>
constexpr bool kKeysInRegisters = kD == 64;

template <class T, int kD, int kM, BackwardWork kWork>
__global__ void __launch_bounds__(384, 1)
    attention_backward_main(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = BackwardShared<kD, kM>;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));

  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == 1) {
    const BackwardTask<kM> task(p);
    if (lane == 0) shared.task = task;
  }
  if (warp == 0 && elect_one()) {
    barrier_init(&shared.k_full, 1);
    barrier_init(&shared.v_full, 1);
    barrier_init(&shared.v_empty, 8);
    for (int i = 0; i < Shared::kStagesQ; ++i) barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], 8);
    for (int i = 0; i < Shared::kStagesDo; ++i) barrier_init(&shared.do_full[i], 1), barrier_init(&shared.do_empty[i], 8);
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_dependencies();

  if (warp < 4) {
    // ================ producers ================
    registers_shrink<24>();
    const bool packed = p.cu_seqlens_k != nullptr;
    const BackwardTask<kM>& task = shared.task;
    const Sequence& seq = task.seq;
    const int steps = task.steps(p), head_k = task.head_k, batch_row = task.batch_row;
    if (steps == 0) return;
    const RowCoordinates key_rows(packed, kTileRows, task.first_key, seq.length_k, packed ? seq.first_k : batch_row);
    if (warp == 0 && elect_one()) {
      const uint64_t keep = policy_evict_last();
      const auto query_rows = [&](int m) {
        return RowCoordinates(packed, kM, m * kM, seq.length_q, packed ? seq.first_q : batch_row);
      };
      const auto load_q = [&](int step, int head, int m) {
        const int stage = stage_of<Shared::kStagesQ>(step);
        barrier_wait(&shared.q_empty[stage], phase_of<Shared::kStagesQ>(step) ^ 1);
        barrier_expect_bytes(&shared.q_full[stage], Shared::kBytesQ + kM * 4);
        tma_load_tile<kM, kD>(shared.q[stage], &maps.q, &shared.q_full[stage], head, query_rows(m), keep);
        bulk_load(shared.lse2[stage], p.lse2 + head * p.padded_rows_q + seq.padded_q + m * kM, kM * 4, &shared.q_full[stage]);
      };
      barrier_expect_bytes(&shared.k_full, Shared::kBytesKv);
      tma_load_tile<kTileRows, kD>(shared.k, &maps.k, &shared.k_full, head_k, key_rows, keep);
      int head = task.first_head, m = task.begin, next_head = head, next_m = m;  // of dO and of Q, which is one step ahead
      load_q(0, next_head, next_m);
      for (int step = 0; step < steps; ++step) {
        if (++next_m == task.end) next_m = task.begin, ++next_head;
        if (step + 1 < steps) load_q(step + 1, next_head, next_m);
        const int stage = stage_of<Shared::kStagesDo>(step);
        barrier_wait(&shared.do_empty[stage], phase_of<Shared::kStagesDo>(step) ^ 1);
        barrier_expect_bytes(&shared.do_full[stage], Shared::kBytesQ + kM * 4);
        tma_load_tile<kM, kD>(shared.grad_out[stage], &maps.grad_out, &shared.do_full[stage], head, query_rows(m), keep);
        bulk_load(shared.delta[stage], p.delta + head * p.padded_rows_q + seq.padded_q + m * kM, kM * 4, &shared.do_full[stage]);
        head = next_head, m = next_m;
      }
    } else if (warp == 1 && elect_one()) {
      // V, and with a scale V again after the last dP of every head: the consumers scale it in place.
      const int loads = p.scale != nullptr && !kKeysInRegisters<kD> ? p.heads_per_cta + 1 : 1;
      for (int i = 0; i < loads; ++i) {
        barrier_wait(&shared.v_empty, (i & 1) ^ 1);
        barrier_expect_bytes(&shared.v_full, Shared::kBytesKv);
        tma_load_tile<kTileRows, kD>(shared.v, &maps.v, &shared.v_full, head_k, key_rows, policy_evict_last());
      }
    }
    return;
  }

  // ================ consumers ================
  registers_grow<240>();
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
  const BackwardTask<kM>& task = shared.task;
  const bool has_scale = p.scale != nullptr;

  if (task.end > task.begin) {
    const float scale_log2 = p.softmax_scale * kLog2e;
    // V scaled in place and the end of a head; both touch only rows of this warp.
    constexpr bool kRegisters = kKeysInRegisters<kD>;
    uint32_t k_rows_r[kRegisters ? kD / 4 : 1], v_rows_r[kRegisters ? kD / 4 : 1];  // A operands: row r, r + 8 of two column groups a k16 step
    const auto k_at = [&](uint32_t thread, int j, int h) {
      return reinterpret_cast<uint32_t*>(shared.k + j / 8 * (kTileRows * kSlabRowBytes) + swizzled(row_of(thread) + 8 * h, j % 8) +
                                         column_of(thread) * 2);
    };
    const auto v_at = [&](uint32_t thread, int j, int h) {
      return reinterpret_cast<uint32_t*>(shared.v + j / 8 * (kTileRows * kSlabRowBytes) + swizzled(row_of(thread) + 8 * h, j % 8) +
                                         column_of(thread) * 2);
    };
    // This thread's channel of a head's scale into shared memory, a head ahead of its use.
    const auto load_scale = [&](int head) {
      const uint32_t channel = index();
      if (channel >= kD || head >= task.first_head + p.heads_per_cta) return;
      const bool inside = channel < p.head_dim;
      const float* const from = p.scale + task.seq.index * p.scale_batch_stride + head * p.scale_head_stride;
      copy_float(&shared.scale[head % 4][channel], from + (inside ? channel * p.scale_channel_stride : 0), inside);
    };
    const auto scale_at = [&](int head, uint32_t channel) { return *reinterpret_cast<const float2*>(&shared.scale[head % 4][channel]); };
    const auto scale_v = [&](int head) {
      const uint32_t thread = index();
      if constexpr (kRegisters) {
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
          const float2 factor = has_scale ? scale_at(head, 8 * j + column_of(thread)) : make_float2(1.f, 1.f);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 value = unpack<T>(*v_at(thread, j, h));
            v_rows_r[2 * j + h] = pack<T>(value.x * factor.x, value.y * factor.y);
          }
        }
      } else {
#pragma unroll 4
        for (int j = 0; j < kD / 8; ++j) {
          const float2 factor = scale_at(head, 8 * j + column_of(thread));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 value = unpack<T>(*v_at(thread, j, h));
            *v_at(thread, j, h) = pack<T>(value.x * factor.x, value.y * factor.y);
          }
        }
        fence_proxy_async();
        named_sync(2 + group, 128);
      }
    };
    const auto end_of_head = [&](int head_index) {
      const int head = task.first_head + head_index;
      const uint32_t thread = index(), lane = thread % 32;
      const bool first = head_index == 0, last = head_index == p.heads_per_cta - 1;
      if (!kRegisters) barrier_wait(&shared.v_full, (head_index + 1) & 1);
      float* const sums = shared.column_sums[head_index % 2][0];
      if (p.dscale_partial != nullptr) {
        // Columns of V * dV summed over the warp's 16 rows: every step halves the columns a lane keeps.
#pragma unroll
        for (int quarter = 0; quarter < kD / 32; ++quarter) {
          asm volatile("" ::: "memory");
          float x[8];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = 4 * quarter + i;
            const float2 v0 = unpack<T>(*v_at(thread, j, 0)), v1 = unpack<T>(*v_at(thread, j, 1));
            x[2 * i] = v0.x * dv[4 * j] + v1.x * dv[4 * j + 2], x[2 * i + 1] = v0.y * dv[4 * j + 1] + v1.y * dv[4 * j + 3];
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
          // Bits 4, 3, 2 of the lane chose value 4 .. 7, then 2 or 3 of those, ...: value lane / 4 is left.
          sums[thread / 32 * kD + 32 * quarter + 8 * (lane / 8) + column_of(thread) + lane / 4 % 2] = x[0];
        }
      }
      copies_done();
      named_sync(1, 256);  // also keeps the warpgroups within a head of each other: two buffers of sums, four of scales
      if (!last) load_scale(head + 2);
      if (p.dscale_partial != nullptr && thread < kD) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < 8; ++w) sum += sums[w * kD + thread];
        p.dscale_partial[(task.tile * p.heads_q + head) * kD + thread] = sum;
      }
      // dV of the heads so far, this head scaled: kept in memory (each thread its own words), back in registers at the last head.
      float4* const sum = reinterpret_cast<float4*>(p.dv_sum + (task.head_k * p.tile_count_k + task.tile) * kTileRows * kD) +
                          thread / 32 * (kD / 8) * 32 + lane;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        if (j % 4 == 0) asm volatile("" ::: "memory");  // a few loads at a time: there are no registers for all
        const float2 factor = scale_at(head, 8 * j + column_of(thread));
        float4 x = make_float4(dv[4 * j] * factor.x, dv[4 * j + 1] * factor.y, dv[4 * j + 2] * factor.x, dv[4 * j + 3] * factor.y);
        if (!last) {
          if (first) sum[j * 32] = x;
          else reduce_add(reinterpret_cast<float*>(sum + j * 32), x.x, x.y, x.z, x.w);
          x = make_float4(0.f, 0.f, 0.f, 0.f);
        } else if (!first) {
          const float4 before = sum[j * 32];
          x.x += before.x, x.y += before.y, x.z += before.z, x.w += before.w;
        }
        dv[4 * j] = x.x, dv[4 * j + 1] = x.y, dv[4 * j + 2] = x.z, dv[4 * j + 3] = x.w;
      }
      if (!last) scale_v(head + 1);
    };

    const auto k_rows = Operand<Major::kK, kTileRows>::at_uniform(base + group * 64 * kSlabRowBytes);
    const auto v_rows = Operand<Major::kK, kTileRows>::at_uniform(base + Shared::kBytesKv + group * 64 * kSlabRowBytes);
    const auto q_rows = [&](int step) { return Operand<Major::kK, kM>::at_uniform(base + Shared::offset_q(stage_of<Shared::kStagesQ>(step))); };
    // dQ of a step: 64 queries, each warpgroup half of the channels.
    static_assert(kM == 64, "one wgmma of dQ has 64 rows");
    constexpr int kDqColumns = kD / 2, kDqFloats = 64 * kDqColumns / 128;
    const uint32_t dq_columns = group * kDqColumns;
    const auto k_columns = Operand<Major::kMN, kTileRows>::at_uniform(base + dq_columns / 64 * (kTileRows * kSlabRowBytes) + dq_columns % 64 * 2);

    const auto issue_s = [&](float (&acc)[kM / 2], int step) {
      wgmma_fence();
      if constexpr (kRegisters) {
        product<T, Major::kK, kM>(acc, k_rows_r, q_rows(step), false);
      } else {
        product<T, kD>(acc, k_rows, q_rows(step), false);
      }
      wgmma_commit();
    };
    float s[kM / 2];
    barrier_wait(&shared.k_full, 0);
    if constexpr (kRegisters) {
      const uint32_t thread = index();
#pragma unroll
      for (int i = 0; i < kD / 4; ++i) k_rows_r[i] = *k_at(thread, i / 2, i % 2);
    }
    barrier_wait(&shared.q_full[0], 0);
    issue_s(s, 0);
    barrier_wait(&shared.v_full, 0);
    if (has_scale) {
      load_scale(task.first_head);
      load_scale(task.first_head + 1);
      copies_done();
      named_sync(1, 256);
    }
    if (has_scale || kRegisters) scale_v(task.first_head);
    wgmma_wait<0>();
    fence_registers(s);

    const int begin = uniform_register(task.begin), end = uniform_register(task.end);
    int m = begin, head = 0, step = 0;
    const auto issue_dq = [&](float (&dq)[kDqFloats], int buffer) {
      wgmma_fence();
      product<T, kTileRows>(dq, Operand<Major::kK, kM>::at_uniform(base + Shared::offset_ds(buffer)), k_columns, false);
      wgmma_commit();
    };
    const auto add_dq = [&](const float (&dq)[kDqFloats], float* out) {
#pragma unroll
      for (int i = 0; i < kDqFloats / 4; ++i) reduce_add(out + i * 128, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    };
    const int head_tiles = uniform_register(static_cast<uint32_t>(p.padded_rows_q / kM));
    const int first_tile = uniform_register(static_cast<uint32_t>(task.first_head * head_tiles + task.seq.padded_q / kM));
    const auto dq_at = [&](int tile) { return p.dq + static_cast<int64_t>(tile) * (kM * kD) + index() / 32 * (kDqFloats * 32) + index() % 32 * 4; };
    for (;; ++step) {
      const int q_stage = stage_of<Shared::kStagesQ>(step), do_stage = stage_of<Shared::kStagesDo>(step);
      const uint32_t grad_at = base + Shared::offset_grad_out(do_stage);
      const auto q_columns = Operand<Major::kMN, kM>::at_uniform(base + Shared::offset_q(q_stage));
      float dp[kM / 2], next_s[kM / 2];

      // dP^T in flight (behind dK of the step before) while the exponentials are taken.
      barrier_wait(&shared.do_full[do_stage], phase_of<Shared::kStagesDo>(step));
      if constexpr (kWork != BackwardWork::kValue) {
        wgmma_fence();
        if constexpr (kRegisters) {
          product<T, Major::kK, kM>(dp, v_rows_r, Operand<Major::kK, kM>::at_uniform(grad_at), false);
        } else {
          product<T, kD>(dp, v_rows, Operand<Major::kK, kM>::at_uniform(grad_at), false);
        }
        wgmma_commit();
      }
      if (m < task.full_begin || m >= task.full_end) task.mask(p, s, m, task.first_key + row_of(index()));
      const float* const lse2_row = &shared.lse2[q_stage][column_of(index())];
#pragma unroll
      for (int j = 0; j < kM / 8; ++j) {
        const float2 lse2 = *reinterpret_cast<const float2*>(lse2_row + 8 * j);
        s[4 * j] = exp2_approx(s[4 * j] * scale_log2 - lse2.x);
        s[4 * j + 1] = exp2_approx(s[4 * j + 1] * scale_log2 - lse2.y);
        s[4 * j + 2] = exp2_approx(s[4 * j + 2] * scale_log2 - lse2.x);
        s[4 * j + 3] = exp2_approx(s[4 * j + 3] * scale_log2 - lse2.y);
      }

      // dV, then S^T of the next step: in flight while dS is made of dP and the rounded P. After the last step there is no
      // next one: then an old stage is multiplied to no purpose, which costs fewer registers than a branch.
      uint32_t p_rows[kM / 4];
      pack_fragment<T>(p_rows, s);
      wgmma_fence();
      product<T, Major::kMN, kM>(dv, p_rows, Operand<Major::kMN, kM>::at_uniform(grad_at), true);
      wgmma_commit();
      const bool last_of_head = m == end - 1, last = last_of_head && head == p.heads_per_cta - 1;
      if (!last) barrier_wait(&shared.q_full[stage_of<Shared::kStagesQ>(step + 1)], phase_of<Shared::kStagesQ>(step + 1));
      issue_s(next_s, step + 1);
      wgmma_wait<1>();  // dP and dV
      if (has_scale && !kRegisters && last_of_head && lane == 0) barrier_arrive(&shared.v_empty);
      if constexpr (kWork != BackwardWork::kValue) {
        fence_registers(dp);
        const float* const delta_row = &shared.delta[do_stage][column_of(index())];
        uint32_t ds_rows[kM / 4];
#pragma unroll
        for (int j = 0; j < kM / 8; ++j) {
          const float2 delta = *reinterpret_cast<const float2*>(delta_row + 8 * j);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 probability = unpack<T>(p_rows[2 * j + h]);
            dp[4 * j + 2 * h] = probability.x * (dp[4 * j + 2 * h] - delta.x);
            dp[4 * j + 2 * h + 1] = probability.y * (dp[4 * j + 2 * h + 1] - delta.y);
          }
        }
        pack_fragment<T>(ds_rows, dp);
        if constexpr (kWork == BackwardWork::kAll) {
          const uint32_t ds = base + Shared::offset_ds(step % 2), thread = index();
          // The lane's row of matrix lane / 8 of a k16 step is query 16 t + lane / 16 * 8 + lane % 8.
          const uint32_t query = thread % 32 / 16 * 8 + thread % 8, chunk = thread / 32 % 4 * 2 + thread / 8 % 2;
#pragma unroll
          for (int t = 0; t < kM / 16; ++t) {
            stmatrix_transposed(ds + group * (kM * kSlabRowBytes) + swizzled(query, chunk) + t * 16 * kSlabRowBytes, ds_rows[4 * t],
                                ds_rows[4 * t + 1], ds_rows[4 * t + 2], ds_rows[4 * t + 3]);
          }
          fence_proxy_async();
          if (lane == 0) barrier_arrive(&shared.do_empty[do_stage]);
          // dQ needs dS of both warpgroups. A buffer of dS is written again two steps on, after the next barrier, which a
          // warpgroup reaches only when its dQ of this step is done.
          named_sync(1, 256);
          float* const out = dq_at(first_tile + head * head_tiles + m);
          float dq[kDqFloats];
          issue_dq(dq, step % 2);
          product<T, Major::kMN, kM>(dk, ds_rows, q_columns, true);
          wgmma_commit();
          wgmma_wait<1>();  // dQ, and before it the next S
          fence_registers(dq);
          add_dq(dq, out);
        } else {
          __syncwarp();
          if (lane == 0) barrier_arrive(&shared.do_empty[do_stage]);
          wgmma_fence();
          product<T, Major::kMN, kM>(dk, ds_rows, q_columns, true);
          wgmma_commit();
          wgmma_wait<1>();  // the next S
        }
      } else {
        if (lane == 0) barrier_arrive(&shared.do_empty[do_stage]), barrier_arrive(&shared.q_empty[q_stage]);
        wgmma_wait<0>();
      }
      wgmma_wait<0>();  // dK: ptxas serialises where it stays in flight into the next step
      fence_registers(dk);
      if (kWork != BackwardWork::kValue && lane == 0) barrier_arrive(&shared.q_empty[q_stage]);
      fence_registers(next_s);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) s[i] = next_s[i];
      ++m;
      if (last_of_head) {
        if (has_scale) {
          fence_registers(dv);
          end_of_head(head);
        }
        if (last) break;
        m = begin, ++head;
      }
    }
    wgmma_wait<0>();
    fence_registers(dk);
    fence_registers(dv);
  } else if (p.dscale_partial != nullptr) {
    for (int i = index(); i < p.heads_per_cta * kD; i += 256) p.dscale_partial[(task.tile * p.heads_q + task.first_head) * kD + i] = 0.f;
  }

  // ================ epilogue ================
  const uint32_t thread = index();
  if (p.splits > 1) {
    const int64_t at = ((static_cast<int64_t>(task.split) * p.heads_k + task.head_k) * p.tile_count_k + task.tile) * kTileRows * kD +
                       (thread / 32 * (kD / 8) * 32 + lane) * 4;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      if (p.dk_partial != nullptr) *reinterpret_cast<float4*>(p.dk_partial + at + j * 128) = make_float4(dk[4 * j], dk[4 * j + 1], dk[4 * j + 2], dk[4 * j + 3]);
      if (p.dv_partial != nullptr) *reinterpret_cast<float4*>(p.dv_partial + at + j * 128) = make_float4(dv[4 * j], dv[4 * j + 1], dv[4 * j + 2], dv[4 * j + 3]);
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
        *reinterpret_cast<float2*>(tile + (lane / 4 + 8 * h) * (kD + kPad) + 8 * j + column_of(thread)) = make_float2(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
      }
    }
    __syncwarp();
    store_rows<T, kD>(p, tile, min(16, task.seq.length_k - task.first_key - first_row), output, task.seq.first_k + task.first_key + first_row,
                      task.batch_row, p.seqlen_k, task.head_k, p.heads_k, factor, rotate, p.positions_k);
    __syncwarp();
  };
  if (p.grad_v != nullptr) write(dv, p.grad_v, 1.f, false);
  if (kWork != BackwardWork::kValue && p.grad_k != nullptr) write(dk, p.grad_k, p.softmax_scale, p.cos != nullptr);
}

}  // namespace seal::sm90
