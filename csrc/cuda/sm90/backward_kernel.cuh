// Main kernel of the attention backward, head_dim up to 128: a thread block on every multiprocessor takes tiles of 128 keys of
// a key/value head, one after the other, and walks through the query tiles that see them, for each of its query heads in turn,
// so that dK and dV stay in registers.
//
// Warpgroup 0 produces: warp 0 runs the copy engine, warp 1 picks tiles, warps 2 and 3 add dQ to global memory.
// Warpgroups 1 and 2 consume, 64 keys each. A step, kBlockM queries, is five products:
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dQ = dS K    dK += dS^T Q
// S^T and dP^T are computed transposed, so that P^T and dS^T are A operands in registers; only dQ needs dS in shared memory. It
// is made a step late, so that neither warpgroup waits for the other's dS of the same step. dQ leaves through shared memory by
// bulk reductions: added from registers, the consuming warps would wait for memory at their next fence. dK and dV leave through
// the shared memory of dS, while the copy engine fills that of K, V, Q and dO for the next tile.
//
// A scale needs nothing here: dO is then scale * g (backward_rows.cuh). Heads whose dscale must be exact are walked through once
// more after the epilogue: P^T g of each, and the column sums of V * (P^T g).
#pragma once

#include "backward_consumer.cuh"
#include "backward_producer.cuh"

namespace seal::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_main(const __grid_constant__ BackwardKernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Shared = BackwardShared<Config>;
  extern __shared__ char raw[];
  const uint32_t base = uniform_register((smem_address(raw) + 1023) & ~1023u);
  Shared& shared = *static_cast<Shared*>(__cvta_shared_to_generic(base));
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  if (warp == 0 && elect_one()) {
    shared.init_barriers();
    fence_barrier_init();
    prefetch_map(&maps.k);
    prefetch_map(&maps.q);
    prefetch_map(&maps.v);
    prefetch_map(&maps.grad_out);
  }
  __syncthreads();
  launch_dependents();
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
    BackwardConsumer<Config>(shared, base, p).run();
  }
}

}  // namespace seal::sm90
