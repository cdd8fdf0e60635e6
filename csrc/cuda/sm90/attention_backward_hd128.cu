// Attention backward on sm_90a for a head_dim from 72 to 128.
#include "backward_launch.cuh"

namespace seal::sm90 {

extern template cudaError_t launch_products<__nv_bfloat16, 128, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);
extern template cudaError_t launch_products<__half, 128, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);

template cudaError_t launch_backward<__nv_bfloat16, 128>(const BackwardKernelParams&, cudaStream_t);
template cudaError_t launch_backward<__half, 128>(const BackwardKernelParams&, cudaStream_t);

}  // namespace seal::sm90
