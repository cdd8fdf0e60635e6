// Stands for csrc/cuda/sm90/wgmma.cuh where the kernels are compiled for the CPU: decoding takes nothing from it but this.
#pragma once

#include "tma.cuh"

namespace seal::sm90 {

template <class T, int kAcc>
inline void pack_fragment(uint32_t (&a)[kAcc / 2], const float (&acc)[kAcc]) {
  for (int i = 0; i < kAcc / 2; ++i) a[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

}  // namespace seal::sm90
