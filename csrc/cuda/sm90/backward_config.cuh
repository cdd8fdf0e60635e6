// What the two sides of the backward's main kernel share: its configuration and its shared memory with the barriers.
#pragma once

#include "backward_keys.cuh"
#include "backward_store.cuh"

namespace seal::sm90 {

// kOrdered: dQ is added up in the order of the keys (deterministic mode), see add_queries() in backward_producer.cuh.
template <class T_, int kHeadDim_, BackwardWork kWork_, Masking kMasking_, bool kOrdered_ = false>
struct BackwardConfig {
  using T = T_;
  static constexpr Masking kMasking = kMasking_;
  static constexpr int kHeadDim = kHeadDim_;  // of the shared-memory tiles; the tensors' may be smaller
  static constexpr BackwardWork kWork = kWork_;
  static constexpr bool kOrdered = kOrdered_;
  static_assert(!kOrdered || (kWork == BackwardWork::kAll && kMasking == Masking::kBand));
  static constexpr int kBlockM = step_rows(kHeadDim), kBlockN = kTileRows;
  static constexpr int kStages = 2;     // of Q with lse2, of dO with delta
  static constexpr int kDsBuffers = 2;
  static constexpr int kWarpgroups = 2;  // consumers
  static constexpr int kThreads = 128 * (kWarpgroups + 1), kConsumerThreads = 128 * kWarpgroups, kConsumerWarps = 4 * kWarpgroups;
  // 65,536 registers: 24 + 2 * 240 for each of 128 lanes of a warpgroup. Without dK the consumers need fewer, and the general mask's
  // tiles are found without a spill.
  static constexpr bool kLeanConsumers = kMasking == Masking::kGeneral && (kWork == BackwardWork::kValue || kWork == BackwardWork::kScale);
  static constexpr int kProducerRegisters = kLeanConsumers ? 32 : 24, kConsumerRegisters = kLeanConsumers ? 232 : 240;
  static constexpr bool kRowAhead = false;  // load_step() holds the place in the row vectors while it waits: no register for it
  // The producing warps that take a task: the copy engine's, and with dQ the two that add it.
  static constexpr int kTaskReaders = kWork == BackwardWork::kAll ? 3 : 1;
  // dQ of a step, 64 rows a warpgroup: of 128 queries each takes half, of 64 each takes half of the channels.
  static constexpr bool kSplitRows = kBlockM == 128;
  static constexpr int kDqColumns = kSplitRows ? kHeadDim : kHeadDim / 2, kDqFloats = 64 * kDqColumns / 128;
  static constexpr int kBytesKv = tile_bytes(kBlockN, kHeadDim), kBytesQ = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kBytesDs = tile_bytes(kBlockM, kBlockN);
  // Rows of dK or dV that a warp stages at a time.
  static constexpr int kStagedRows = kDsBuffers * kBytesDs >= kBlockN * (kHeadDim + kPad) * 4 ? 16 : 8;
};

// Who fills and who empties what. `full` barriers are arrived at by the side that fills, `empty` ones by the side that reads; the
// other side waits. Arrivals are one a warp of consumers (its lane 0), one a producing warp (its one thread).
//
//   buffer               filled by                  read by                            count of full, empty
//   task[slot]           warp 1                     warps 0, 2, 3 and the consumers    1, kConsumerWarps + kTaskReaders
//   k; v                 warp 0 (copy engine)       the consumers, released once a     1 and bytes, kConsumerWarps
//                                                   task
//   q, lse2 [stage]      warp 0 (copy engine)       the consumers, once a step: last   1 and bytes, kConsumerWarps
//                                                   by the product dK
//   grad_out, delta      warp 0 (copy engine)       the consumers, once a step: last   1 and bytes, kConsumerWarps
//     [stage]                                       by the product dV
//   dq[warpgroup]        that warpgroup             warp 2 or 3, once a step           4, 1
//   ds[buffer]           both warpgroups            both warpgroups, a step later: named barriers (backward_consumer.cuh)
//
// task_wanted: warp 0 tells warp 1 that it has issued all loads of a task.
template <class Config>
struct BackwardShared {
  using Task = BackwardTask<Config::kBlockM, Config::kBlockN, Config::kMasking>;
  static constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM;

  char k[Config::kBytesKv], v[Config::kBytesKv];
  char q[kStages][Config::kBytesQ], grad_out[kStages][Config::kBytesQ];
  char ds[Config::kDsBuffers][Config::kBytesDs];     // [queries][keys]; between the tiles: dK and dV on their way out
  float dq[Config::kWarpgroups][kBlockM * Config::kHeadDim / 2];  // a step's dQ on its way to global memory, in accumulator order
  Task task[2];
  // What the producing warps count, which have no register left for it.
  struct {
    int tasks, operand_tasks, loaded_keys, next_task, adder_tasks[2];
  } counts;
  alignas(16) float lse2[kStages][kBlockM], delta[kStages][kBlockM];  // filled by bulk copies
  uint64_t task_full[2], task_empty[2], task_wanted;
  uint64_t k_full, k_empty, v_full, v_empty;
  uint64_t q_full[kStages], q_empty[kStages], do_full[kStages], do_empty[kStages];
  uint64_t dq_full[Config::kWarpgroups], dq_empty[Config::kWarpgroups];

  // Where a consumer warp stages rows of dK or dV. At head_dim 128 the last warp's place reaches into dq.
  SEAL_DEVICE float* staging(int warp) { return reinterpret_cast<float*>(ds) + warp * Config::kStagedRows * (Config::kHeadDim + kPad); }
  static constexpr bool kStagesInDq = Config::kConsumerWarps * Config::kStagedRows * (Config::kHeadDim + kPad) * 4 > sizeof(ds);
  static_assert(Config::kConsumerWarps * Config::kStagedRows * (Config::kHeadDim + kPad) * 4 <= sizeof(ds) + sizeof(dq[0]));

  static constexpr uint32_t kOffsetV = Config::kBytesKv, kOffsetQ = 2 * Config::kBytesKv;
  static constexpr uint32_t kOffsetGradOut = kOffsetQ + kStages * Config::kBytesQ, kOffsetDs = kOffsetGradOut + kStages * Config::kBytesQ;

  // By one thread.
  SEAL_DEVICE void init_barriers() {
    barriers_init(task_full, 1);
    barriers_init(task_empty, Config::kConsumerWarps + Config::kTaskReaders);
    barrier_init(&task_wanted, 1);
    barrier_init(&k_full, 1);
    barrier_init(&k_empty, Config::kConsumerWarps);
    barrier_init(&v_full, 1);
    barrier_init(&v_empty, Config::kConsumerWarps);
    barriers_init(q_full, 1);
    barriers_init(q_empty, Config::kConsumerWarps);
    barriers_init(do_full, 1);
    barriers_init(do_empty, Config::kConsumerWarps);
    barriers_init(dq_full, Config::kConsumerWarps / Config::kWarpgroups);
    barriers_init(dq_empty, 1);
  }
};

// Steps of a task: those of all its heads; those of its exact heads come once more.
template <class Config>
SEAL_DEVICE int steps_of(const BackwardKernelParams& p, const typename BackwardShared<Config>::Task& task) {
  return Config::kWork == BackwardWork::kScale ? 0 : (task.end - task.begin) * p.heads_per_cta;
}

}  // namespace seal::sm90
