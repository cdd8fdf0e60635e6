// Attention forward on sm_90a for masks with chunks or sinks.
#include "forward_launch.cuh"

namespace seal::sm90 {

template cudaError_t launch_forward<Masking::kGeneral>(const AttentionForwardParams&, cudaStream_t);

}  // namespace seal::sm90
