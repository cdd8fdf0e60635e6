// The producing side of the backward's main kernel: one warp that picks tiles, one that runs the copy engine, two that add dQ to
// global memory.
#pragma once

#include "backward_config.cuh"

namespace seal::sm90 {

// Warp 1: picks tiles, the first by the number of the thread block, the others through the counter, as late as they can wait. In
// the order of the keys (kOrdered) all of them through the counter: a tile may have to wait for those before it, which are then
// at work already, whether or not all thread blocks of the grid run at the same time.
template <class Config>
SEAL_DEVICE void produce_tasks(BackwardShared<Config>& shared, const BackwardKernelParams& p) {
  const bool writes = threadIdx.x % 32 == 0;
  volatile int &count = shared.counts.tasks, &next = shared.counts.next_task;
  const auto claim = [&] { return atomicAdd(p.task_counter, 1) + (Config::kOrdered ? 0 : static_cast<int>(gridDim.x)); };
  if (writes) {
    count = 0;
    next = Config::kOrdered ? claim() : blockIdx.x;
  }
  __syncwarp();
#pragma unroll 1
  while (true) {
    const int slot = stage_of<2>(count);
    auto& task = shared.task[slot];
    const bool any = next < p.task_count;
    barrier_wait(&shared.task_empty[slot], phase_of<2>(count) ^ 1);
    if (any) {
      task.find(p, next, writes);
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
      next = claim();
      count = count + 1;
    }
    __syncwarp();
  }
}

// One thread of warp 0: of each task K and V, then step by step Q with lse2 and dO with delta; then the steps of the exact heads
// with the unscaled dO.
template <class Config>
SEAL_DEVICE void produce_operands(BackwardShared<Config>& shared, const BackwardKernelParams& p, const BackwardMaps& maps) {
  constexpr int kD = Config::kHeadDim, kSlabs = slabs(kD);
  const uint64_t keep = policy_evict_last();
  volatile int &count = shared.counts.operand_tasks, &keys_count = shared.counts.loaded_keys;
  int step = 0;
  count = keys_count = 0;
#pragma unroll 1
  while (true) {
    const int slot = stage_of<2>(count);
    barrier_wait(&shared.task_full[slot], phase_of<2>(count));
    const auto& task = shared.task[slot];
    if (!task.any) return;
    const int steps = steps_of<Config>(p, task);
    if (steps > 0 || task.exact_steps() > 0) {
      const RowCoordinates keys = key_coordinates<Config>(p, task);
      barrier_wait(&shared.k_empty, (keys_count & 1) ^ 1);
      load_keys<Config>(shared.k, &maps.k, &shared.k_full, task.head_k, keys, keep, kSlabs);
      barrier_wait(&shared.v_empty, (keys_count & 1) ^ 1);
      load_keys<Config>(shared.v, &maps.v, &shared.v_full, task.head_k, keys, keep, kSlabs);
      keys_count = keys_count + 1;
    }
#pragma unroll 1
    for (int i = 0, head = task.first_head, place = task.begin; i < steps; ++i) {
      load_step<Config>(shared, p, &maps.q, &maps.grad_out, task, step++, head, query_tile<kD>(task.begin, task.end, place), keep, kSlabs);
      if (++place == task.end) {
        place = task.begin;
        ++head;
      }
    }
#pragma unroll 1
    for (int i = task.exact_steps(), head = task.first_exact_head(), place = task.begin; i > 0; --i) {
      load_step<Config>(shared, p, &maps.q, &maps.unscaled_grad_out, task, step++, head, query_tile<kD>(task.begin, task.end, place), keep, kSlabs);
      if (++place == task.end) {
        place = task.begin;
        head = task.next_exact_head(head);
      }
    }
    // The consumers are two steps and an epilogue behind.
    barrier_arrive(&shared.task_wanted);
    barrier_arrive(&shared.task_empty[stage_of<2>(count)]);
    count = count + 1;
  }
}

// One thread of warp 2 or 3: dQ of one warpgroup. The fence on this side of the barrier orders its shared-memory writes before the
// reduction; on the other side all consumers would wait for it.
//
// kOrdered: of the tiles of keys that see a tile of queries, each adds its dQ when p.added says that those before it have, so that
// the sum has one order. A tile only waits for tiles that were claimed before it; the first of those at work waits for none.
template <class Config>
SEAL_DEVICE void add_queries(BackwardShared<Config>& shared, const BackwardKernelParams& p, int group) {
  constexpr int kM = Config::kBlockM, kD = Config::kHeadDim;
  const uint64_t keep = policy_evict_last();
  volatile int& count = shared.counts.adder_tasks[group];
  uint32_t phase = 0;
  for (count = 0;; count = count + 1) {
    const int slot = stage_of<2>(count);
    barrier_wait(&shared.task_full[slot], phase_of<2>(count));
    const auto& task = shared.task[slot];
    if (!task.any) break;
    int first_tile = static_cast<int>((task.first_head * p.padded_rows_q + task.seq.padded_q) / kM);  // of the head, in the padded space
    int place = task.begin;
    for (int i = steps_of<Config>(p, task); i > 0; --i) {
      const int tile = query_tile<kD>(task.begin, task.end, place);
      [[maybe_unused]] int32_t* const added = p.added + 2 * (first_tile + tile) + group;
      if constexpr (Config::kOrdered) {
        const int first_key_tile = columns_seen(band_of_queries(p, task.seq), tile * kM).begin / Config::kBlockN;
        wait_for_count(added, task.first_key / Config::kBlockN - first_key_tile);
        fence_proxy_async_global();
      }
      barrier_wait(&shared.dq_full[group], phase);
      phase ^= 1;
      fence_proxy_async();
      bulk_reduce_add(p.dq + static_cast<int64_t>(first_tile + tile) * (kM * kD) + group * (kM * kD / 2), shared.dq[group], kM * kD * 2, keep);
      bulk_commit();
      bulk_wait_read();
      barrier_arrive(&shared.dq_empty[group]);
      if constexpr (Config::kOrdered) {
        bulk_wait();
        fence_proxy_async_global();
        count_up(added);
      }
      if (++place == task.end) {
        place = task.begin;
        first_tile += static_cast<int>(p.padded_rows_q / kM);
      }
    }
    barrier_arrive(&shared.task_empty[stage_of<2>(count)]);
  }
  bulk_wait();
}

}  // namespace seal::sm90
