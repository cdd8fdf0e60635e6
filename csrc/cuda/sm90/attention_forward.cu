// Attention forward on sm_90a: the kernels for a band of keys (causal, full, windows), and the choice of the kernel.
#include "forward_launch.cuh"

namespace seal {

namespace sm90 {
extern template cudaError_t launch_forward<Masking::kGeneral>(const AttentionForwardParams&, cudaStream_t);
}

cudaError_t launch_attention_forward(const AttentionForwardParams& params, cudaStream_t stream) {
  if (params.head_dim > 256 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return params.mask.is_band() ? sm90::launch_forward<Masking::kBand>(params, stream) : sm90::launch_forward<Masking::kGeneral>(params, stream);
}

}  // namespace seal
