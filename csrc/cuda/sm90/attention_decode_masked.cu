// Attention forward for few queries on sm_90a, for masks with chunks or sinks.
#include "decode_launch.cuh"

namespace seal::sm90 {

template cudaError_t launch_decode_of<Masking::kGeneral>(const AttentionForwardParams&, const AttentionDecodePlan&, void*, cudaStream_t);

}  // namespace seal::sm90
