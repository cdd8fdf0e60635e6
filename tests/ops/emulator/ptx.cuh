// Stands for csrc/cuda/sm90/ptx.cuh where the kernels are compiled for the CPU (fibers.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "constants.h"
#include "fibers.h"

#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __device__
#undef __forceinline__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __device__
#define __forceinline__ inline
#define SEAL_DEVICE inline
#define threadIdx (emulator::Index{unsigned(emulator::current)})
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)

using std::max;
using std::min;

enum { kSyncWarp = 1, kShuffleXor, kShuffle, kAny, kLoadMatrix, kLoadMatrixTransposed, kMma };

inline void __trap() { emulator::fail("traps"); }
inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp() { emulator::collective(kSyncWarp, {}); }
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return __uint_as_float(emulator::collective(kShuffleXor, {{__float_as_uint(value)}})[(emulator::current % 32) ^ mask].words[0]);
}
inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane) { return emulator::collective(kShuffle, {{value}})[lane].words[0]; }
inline bool __any_sync(unsigned, bool mine) {
  const auto* all = emulator::collective(kAny, {{mine}});
  return std::any_of(all, all + 32, [](const auto& lane) { return lane.words[0] != 0; });
}
inline float __fdividef(float a, float b) { return a / b; }
// Of the persistent kernels' scheduler, which comes with a header and is never called here.
inline uint32_t __shfl_up_sync(unsigned, uint32_t, int) { emulator::fail("not emulated"); }
inline unsigned __ballot_sync(unsigned, bool) { emulator::fail("not emulated"); }
inline int __ffs(unsigned) { emulator::fail("not emulated"); }
inline int atomicAdd(int*, int) { emulator::fail("not emulated"); }

namespace seal::sm90 {

inline uint32_t smem_address(const void* pointer) { return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::shared_memory); }
inline uint32_t warp_uniform(uint32_t value) { return value; }
inline void barrier_init(uint64_t* b, uint32_t arrivals) { emulator::barriers[b] = {int(arrivals), int(arrivals), 0, 0}; }
inline void barrier_arrive(uint64_t* b) { emulator::arrive(b); }
inline void barrier_expect_bytes(uint64_t* b, uint32_t bytes) {
  emulator::barrier(b).bytes += bytes;
  emulator::arrive(b);
}
inline void barrier_wait(uint64_t* b, uint32_t phase) {
  while (emulator::barrier(b).phase == phase) emulator::yield();
}
inline void fence_barrier_init() {}
inline void fence_proxy_async() {}  // the proxies' order is not emulated
inline void launch_dependents() {}
inline void wait_for_dependencies() {}
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }

template <class T>
inline uint16_t bits_of(float value) {
  T rounded;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    rounded = __float2bfloat16(value);
  } else {
    rounded = __float2half(value);
  }
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}
template <class T>
inline float value_of(uint16_t bits) {
  T value;
  memcpy(&value, &bits, 2);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return __half2float(value);
  }
}
template <class T>
inline uint32_t pack(float low, float high) {
  return bits_of<T>(low) | uint32_t(bits_of<T>(high)) << 16;
}

inline void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  if (address % 16 != 0) emulator::fail("ldmatrix at an address that is no multiple of 16");
  const auto* addresses = emulator::collective(transposed ? kLoadMatrixTransposed : kLoadMatrix, {{address}});
  const int lane = emulator::current % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int c = 0; c < 2; ++c) {
      int row = lane / 4, column = 2 * (lane % 4) + c;
      if (transposed) std::swap(row, column);
      memcpy(&pair[c], emulator::shared_memory + addresses[8 * i + row].words[0] + 2 * column, 2);
    }
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, true); }

// m16n8k16 from the fragments of PTX's manual.
template <class T>
inline void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto* all = emulator::collective(kMma, {{a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = emulator::current % 32;
  const auto half = [](uint32_t word, int which) { return value_of<T>(static_cast<uint16_t>(word >> (16 * which))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float x = half(all[row % 8 * 4 + k % 8 / 2].words[row / 8 + 2 * (k / 8)], k % 2);
      c[i] += x * half(all[column * 4 + k % 8 / 2].words[4 + k / 8], k % 2);
    }
  }
}

}  // namespace seal::sm90
