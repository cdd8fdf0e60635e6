// Attention backward on sm_90a for a head_dim from 72 to 128.
#include "backward_launch.cuh"

namespace seal::sm90 {

template cudaError_t launch_backward<__nv_bfloat16, 128>(const BackwardKernelParams&, cudaStream_t);
template cudaError_t launch_backward<__half, 128>(const BackwardKernelParams&, cudaStream_t);

}  // namespace seal::sm90
