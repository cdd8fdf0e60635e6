// The PTX instructions that the Hopper kernels use, one thin wrapper each: mbarriers, named barriers, proxy fences,
// register reallocation, 1-D bulk copies, stmatrix, conversions and the approximate base-2 functions.
// Tensor copies are in tma.cuh, matrix products in wgmma.cuh. Everything is forced inline: a call inside a kernel
// makes ptxas serialise its wgmma (C7510).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define SEAL_DEVICE __device__ __forceinline__

namespace seal::sm90 {

// Address of an object in shared memory as the 32-bit number that PTX takes.
SEAL_DEVICE uint32_t smem_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// A value equal in all lanes, told to the compiler, so that it (and what is derived from it) lives in uniform registers.
SEAL_DEVICE uint32_t warp_uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// A value equal in all lanes, in a uniform register from the start (the result of a reduction over the warp is one): what is
// derived from it then costs no register of the threads, of which the accumulators leave few.
SEAL_DEVICE uint32_t uniform_register(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

// True in exactly one lane of a converged warp.
SEAL_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// The lane's number, read anew at every call: what is computed from it is not kept in registers from one use to the next.
SEAL_DEVICE uint32_t fresh_lane() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ---- mbarriers: `phase` is the parity of the phase to wait for. A fresh barrier is in phase 0: waiting for parity 1
// returns at once, waiting for parity 0 returns when the first phase has completed.

SEAL_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialisation of barriers visible to the async proxy (TMA); follow with __syncthreads.
SEAL_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

SEAL_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Arrives once and adds `bytes` to what the phase waits for. TMA counts whole boxes, zero-filled parts included.
SEAL_DEVICE void barrier_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes) : "memory");
}

SEAL_DEVICE bool barrier_test(uint64_t* barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(smem_address(barrier)), "r"(phase)
      : "memory");
  return done != 0;
}

// As barrier_test, but returns at once where that may suspend the thread for a while.
SEAL_DEVICE bool barrier_peek(uint64_t* barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(smem_address(barrier)), "r"(phase)
      : "memory");
  return done != 0;
}

SEAL_DEVICE void barrier_wait(uint64_t* barrier, uint32_t phase) {
  while (!barrier_test(barrier, phase)) {
  }
}

// ---- named barriers (id 0 is __syncthreads); `threads` counts those that sync and those that only arrive.

SEAL_DEVICE void named_sync(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
SEAL_DEVICE void named_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Orders ordinary shared-memory writes before later reads by TMA or wgmma: the writing threads call it, then a barrier, then the
// reader is started; or after the barrier the thread that starts the reader calls it.
SEAL_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- register reallocation of a whole warpgroup; needs __launch_bounds__(threads, 1), with the 1 (C7508).

template <int kRegisters>
SEAL_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SEAL_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- programmatic dependent launch

// Lets a dependent kernel be launched once every thread block has come here or ended; its waiting is its own affair.
SEAL_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernels this one depends on have finished and their writes are visible.
SEAL_DEVICE void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- counters in global memory, by which thread blocks follow each other

// Waits until *counter is `count`, and sees what was written before it was counted up to that.
SEAL_DEVICE void wait_for_count(const int32_t* counter, int32_t count) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now != count);
}
SEAL_DEVICE void count_up(int32_t* counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory"); }
// Between bulk copies and ordinary accesses of the same global memory, here those of wait_for_count and count_up.
SEAL_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- 1-D bulk copies: 16-byte aligned addresses, sizes multiples of 16. Issue them from one thread.

SEAL_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_address(shared)),
               "l"(global), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}

// global[i] += shared[i], fp32; `policy`: an L2 eviction priority (tma.cuh).
SEAL_DEVICE void bulk_reduce_add(float* global, const void* shared, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(global),
               "r"(smem_address(shared)), "r"(bytes), "l"(policy)
               : "memory");
}

// Bulk stores (1-D or tensor) are waited for by the thread that issued them, in groups.
SEAL_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending groups still read shared memory (their buffers may then be written again).
template <int kPending = 0>
SEAL_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending groups are unfinished (their writes are then in global memory).
template <int kPending = 0>
SEAL_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- arithmetic and conversion

// Softmax works to the base 2: every kernel multiplies its softmax scale by the one, and a logarithm by the other. A quotient by kLn2
// would round otherwise, and the backward's probabilities would not be the forward's.
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

SEAL_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEAL_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to bf16 or fp16 in one register; `low` in the lower half (the lower address).
template <class T>
SEAL_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The reverse of pack.
template <class T>
SEAL_DEVICE float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
}

// ---- ldmatrix: the reverse of stmatrix below, same addresses and registers.

SEAL_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- stmatrix: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8; register
// i of a lane holds elements (lane / 4, 2 * (lane % 4) + {0, 1}) of matrix i, as in a wgmma accumulator after pack().

SEAL_DEVICE void stmatrix(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
// Each matrix stored transposed.
SEAL_DEVICE void stmatrix_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}

}  // namespace seal::sm90
