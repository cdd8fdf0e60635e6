// Attention backward on sm_90a for masks with chunks or sinks and a head_dim of 129 to 256.
#include "backward_launch.cuh"

namespace seal::sm90 {

template cudaError_t launch_products<__nv_bfloat16, 256, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);
template cudaError_t launch_products<__half, 256, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);

}  // namespace seal::sm90
