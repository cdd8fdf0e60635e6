// The way an fp32 tile leaves for global memory: from accumulators to shared memory, from there as rows, with the inverse rotation,
// rounding and 16-byte stores.
#pragma once

#include "backward_common.cuh"

namespace seal::sm90 {

SEAL_DEVICE float read_as_float(const void* data, int64_t index, int type) {
  if (type == 2) return __ldg(static_cast<const float*>(data) + index);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(data) + index);
  return type == 0 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

SEAL_DEVICE int64_t position_of(const BackwardPositions& positions, int batch_row, int64_t token) {
  if (positions.data == nullptr) return positions.first + token;
  const int64_t at = batch_row * positions.batch_stride + token * positions.token_stride;
  return positions.is_int64 ? __ldg(static_cast<const long long*>(positions.data) + at) : __ldg(static_cast<const int*>(positions.data) + at);
}

// Rows of an fp32 tile in shared memory end in kPad floats: with D + 8 words a row, the accumulator's float2 writes have no
// bank conflicts.
constexpr int kPad = 8;

// 8 * kHalves of a warp's 16 accumulator rows, from half `first_half` on, to the rows of `tile`.
template <int kD, int kHalves>
SEAL_DEVICE void stage_rows(float* tile, const float (&accumulator)[kD / 2], int first_half, int lane) {
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float* const at = tile + (lane / 4 + 8 * h) * (kD + kPad) + 8 * j + lane % 4 * 2;
      const int i = 4 * j + 2 * (first_half + h);
      *reinterpret_cast<float2*>(at) = make_float2(accumulator[i], accumulator[i + 1]);
    }
  }
}

// One warp writes rows [0, rows) of a tile of kD + kPad floats a row to global memory, times `factor`, after the inverse rotation
// where `rotate`. `token` is the tensor's row (packed: of the whole tensor) of tile row 0.
template <class T, int kD>
SEAL_DEVICE void store_rows(const BackwardKernelParams& p, const float* tile, int rows, void* output, int64_t token, int batch_row,
                            int64_t rows_per_batch, int head, int heads, float factor, bool rotate, const BackwardPositions& positions) {
  constexpr int kChunks = kD / 8;
  constexpr int kRowsAtOnce = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const int lane = threadIdx.x % 32;
  if (!rotate) {  // several rows at a time on their way
    const int channel = lane % kChunks * 8;
    if (channel >= p.head_dim) return;
    const int64_t stride = static_cast<int64_t>(heads) * p.head_dim;
    T* const to = static_cast<T*>(output) + (batch_row * rows_per_batch + token) * stride + head * p.head_dim + channel;
#pragma unroll 4
    for (int row = lane / kChunks; row < rows; row += kRowsAtOnce) {
      const float4* const values = reinterpret_cast<const float4*>(tile + row * (kD + kPad) + channel);
      const float4 a = values[0], b = values[1];
      *reinterpret_cast<uint4*>(to + row * stride) = make_uint4(pack<T>(a.x * factor, a.y * factor), pack<T>(a.z * factor, a.w * factor),
                                                                pack<T>(b.x * factor, b.y * factor), pack<T>(b.z * factor, b.w * factor));
    }
    return;
  }
  for (int row = lane / kChunks; row < rows; row += kRowsAtOnce) {
    const int channel = lane % kChunks * 8;
    if (channel >= p.head_dim) continue;
    const float* values = tile + row * (kD + kPad);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = values[channel + i];
    if (channel < p.rotary_dim) {
      const int half = p.rotary_dim / 2;
      const int64_t wanted = position_of(positions, batch_row, token + row);
      const bool inside = wanted >= 0 && wanted < p.cos_rows;
      const int64_t position = inside ? wanted : 0;
      const int64_t cos_row = batch_row * p.cos_batch_stride + position * p.cos_row_stride;
      const int64_t sin_row = batch_row * p.sin_batch_stride + position * p.sin_row_stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = channel + i;
        if (c >= p.rotary_dim) break;
        const bool first = p.interleaved ? c % 2 == 0 : c < half;
        const int pair = p.interleaved ? c / 2 : (first ? c : c - half);
        const int partner = p.interleaved ? c ^ 1 : (first ? c + half : c - half);
        const float cos = read_as_float(p.cos, cos_row + pair, p.cos_type), sin = read_as_float(p.sin, sin_row + pair, p.cos_type);
        x[i] = inside ? x[i] * cos + (first ? values[partner] : -values[partner]) * sin : NAN;
      }
    }
    uint4 packed;
    packed.x = pack<T>(x[0] * factor, x[1] * factor);
    packed.y = pack<T>(x[2] * factor, x[3] * factor);
    packed.z = pack<T>(x[4] * factor, x[5] * factor);
    packed.w = pack<T>(x[6] * factor, x[7] * factor);
    const int64_t at = ((batch_row * rows_per_batch + token + row) * heads + head) * static_cast<int64_t>(p.head_dim) + channel;
    *reinterpret_cast<uint4*>(static_cast<T*>(output) + at) = packed;
  }
}

}  // namespace seal::sm90
