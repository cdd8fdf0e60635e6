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

// Eight values of a table from `index` on; 16-byte aligned (BackwardKernelParams::turn_by_vectors).
SEAL_DEVICE void read_eight(const void* data, int64_t index, int type, float (&x)[8]) {
  if (type == 2) {
    const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return;
  }
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + index));
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16;
    x[i] = type == 0 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

template <class T>
SEAL_DEVICE void store_eight(T* to, const float (&x)[8], float factor) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(x[0] * factor, x[1] * factor), pack<T>(x[2] * factor, x[3] * factor),
                                             pack<T>(x[4] * factor, x[5] * factor), pack<T>(x[6] * factor, x[7] * factor));
}

SEAL_DEVICE void load_eight(const float* from, float (&x)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// store_rows with a half-split rotation taken back: a lane holds the two times eight channels that turn together, so it reads
// cos and sin once for both, 16 bytes at a time. `to`: channel 0 of the head in row 0; `stride`: from row to row.
template <class T, int kD>
SEAL_DEVICE void store_turned_rows(const BackwardKernelParams& p, const float* tile, int rows, T* to, int64_t stride, int64_t token,
                                   int batch_row, float factor, const BackwardPositions& positions) {
  const int lane = threadIdx.x % 32, half = p.rotary_dim / 2, pairs = half / 8;
  const int items = pairs + (p.head_dim - p.rotary_dim) / 8, rows_at_once = 32 / items;  // behind the pairs: channels that do not turn
  if (lane >= rows_at_once * items) return;
  const int item = lane % items;
  const bool turns = item < pairs;
  const int channel = turns ? item * 8 : p.rotary_dim + (item - pairs) * 8;
#pragma unroll 2
  for (int row = lane / items; row < rows; row += rows_at_once) {
    float x[8];
    load_eight(tile + row * (kD + kPad) + channel, x);
    if (turns) {
      const int64_t wanted = position_of(positions, batch_row, token + row);
      const bool inside = wanted >= 0 && wanted < p.cos_rows;
      const int64_t position = inside ? wanted : 0;
      float cos[8], sin[8], y[8];
      read_eight(p.cos, batch_row * p.cos_batch_stride + position * p.cos_row_stride + channel, p.cos_type, cos);
      read_eight(p.sin, batch_row * p.sin_batch_stride + position * p.sin_row_stride + channel, p.cos_type, sin);
      load_eight(tile + row * (kD + kPad) + channel + half, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float first = inside ? x[i] * cos[i] + y[i] * sin[i] : NAN;
        y[i] = inside ? y[i] * cos[i] - x[i] * sin[i] : NAN;
        x[i] = first;
      }
      store_eight(to + row * stride + channel + half, y, factor);
    }
    store_eight(to + row * stride + channel, x, factor);
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
  if (p.turn_by_vectors) {
    const int64_t stride = static_cast<int64_t>(heads) * p.head_dim;
    T* const to = static_cast<T*>(output) + (batch_row * rows_per_batch + token) * stride + head * p.head_dim;
    store_turned_rows<T, kD>(p, tile, rows, to, stride, token, batch_row, factor, positions);
    return;
  }
  // Interleaved pairs, and tables that 16-byte reads do not fit.
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
