// Attention backward on sm_90a for masks with chunks or sinks and a head_dim up to 64.
#include "backward_launch.cuh"

namespace seal::sm90 {

template cudaError_t launch_products<__nv_bfloat16, 64, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);
template cudaError_t launch_products<__half, 64, Masking::kGeneral>(const BackwardKernelParams&, cudaStream_t);

}  // namespace seal::sm90
