// rope: rotates Q and K by their positions' angles, in fp32, in one pass over memory.
//
// Memory-bound: the floor is each element read once and written once at the card's copy bandwidth. So every access is
// a 16-byte vector, neighbouring lanes take neighbouring vectors, and a CTA owns a block of tokens with all their
// heads (or a share of them, where tokens are few), so that cos and sin of a token are read once and stay in registers.
//
//   thread  = (token lane, head lane, item lane)            item lanes are neighbours in a warp
//   item    = the two vectors of a head that turn together: channels [i, i + VEC) and [R/2 + i, R/2 + i + VEC)
//             (half-split: the halves of VEC pairs; interleaved: VEC/2 whole pairs each), or two vectors of the
//             channels beyond R that are only copied
//   loop    = heads of Q, then heads of K, UNROLL of them in flight a thread
//
// VEC = 1 is the same kernel one element at a time, for sizes, strides and pointers that are no multiple of 16 bytes.
#include "rope.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace seal {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // CTAs an SM that the registers must allow
constexpr int UNROLL = 4;   // heads in flight a thread

// How the threads of a CTA are dealt out; filled by launch_rope.
struct Tiling {
  int item_lanes, head_lanes, token_lanes;
  int items, rotated_items;                   // of a head: all, and those that turn
  int heads_per_cta;
};

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Vector {
  T values[VEC];
};

// VEC elements as loaded: bits that stay packed until their turn comes. (As an array of 16-bit elements the compiler
// unpacks them at the load, one register each, and spills.)
template <int BYTES> struct BitsOf { using type = uint4; };
template <> struct BitsOf<2> { using type = uint16_t; };
template <> struct BitsOf<4> { using type = uint32_t; };
template <typename T, int VEC> using Bits = typename BitsOf<sizeof(T) * VEC>::type;

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float2(float2 x, __nv_bfloat162& y) { y = __float22bfloat162_rn(x); }
__device__ __forceinline__ void from_float2(float2 x, __half2& y) { y = __float22half2_rn(x); }
template <typename T> struct PairOf { using type = __half2; };
template <> struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };

template <typename T, int VEC>
__device__ __forceinline__ void unpack(const Bits<T, VEC>& bits, float* x) {
  if constexpr (sizeof(T) == 2 && VEC > 1) {
    const auto* pairs = reinterpret_cast<const typename PairOf<T>::type*>(&bits);
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      const float2 pair = to_float2(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
    const auto* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = to_float(values[i]);
  }
}

template <typename T, int VEC>
__device__ __forceinline__ void pack(const float* x, Bits<T, VEC>& bits) {
  if constexpr (sizeof(T) == 2 && VEC > 1) {
    auto* pairs = reinterpret_cast<typename PairOf<T>::type*>(&bits);
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) from_float2(make_float2(x[2 * i], x[2 * i + 1]), pairs[i]);
  } else {
    auto* values = reinterpret_cast<T*>(&bits);
#pragma unroll
    for (int i = 0; i < VEC; ++i) from_float(x[i], values[i]);
  }
}

// N values of cos or sin as fp32. Aligned to N elements wherever N > 1 (launch_rope sees to it).
template <typename C, int N>
__device__ __forceinline__ void load_angles(const void* base, int64_t index, float* out) {
  constexpr int kStep = N * sizeof(C) > 16 ? 16 / sizeof(C) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const auto x = *reinterpret_cast<const Vector<C, kStep>*>(static_cast<const C*>(base) + index + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = to_float(x.values[j]);
  }
}

template <int N>
__device__ __forceinline__ void load_angles(RopeType type, const void* base, int64_t index, float* out) {
  if (type == RopeType::fp32) load_angles<float, N>(base, index, out);
  else if (type == RopeType::bf16) load_angles<__nv_bfloat16, N>(base, index, out);
  else load_angles<__half, N>(base, index, out);
}

__device__ __forceinline__ void rotate(float& x, float& y, float cosine, float sine) {
  const float turned = x * cosine - y * sine;
  y = y * cosine + x * sine;
  x = turned;
}

template <typename T, int VEC, bool INTERLEAVED>
__device__ __forceinline__ void rotate(Bits<T, VEC>& a, Bits<T, VEC>& b, const float* cosine, const float* sine) {
  float x[VEC], y[VEC];
  unpack<T, VEC>(a, x);
  unpack<T, VEC>(b, y);
  if constexpr (INTERLEAVED && VEC > 1) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      rotate(x[2 * i], x[2 * i + 1], cosine[i], sine[i]);
      rotate(y[2 * i], y[2 * i + 1], cosine[VEC / 2 + i], sine[VEC / 2 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) rotate(x[i], y[i], cosine[i], sine[i]);
  }
  pack<T, VEC>(x, a);
  pack<T, VEC>(y, b);
}

template <typename T, int VEC, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads, kBlocks)
rope_kernel(const __grid_constant__ RopeParams p, const __grid_constant__ Tiling t) {
  const int item_lane = threadIdx.x % t.item_lanes;
  const int head_lane = threadIdx.x / t.item_lanes % t.head_lanes;
  const int token_lane = threadIdx.x / (t.item_lanes * t.head_lanes);

  // Which tokens and heads: heads are numbered through Q and then K. Not joint: blockIdx.z is 0 for Q and 1 for K.
  const RopeOperand& own = blockIdx.z == 0 ? p.q : p.k;
  const int first_head = (blockIdx.z == 0 ? 0 : p.q.heads) + blockIdx.y * t.heads_per_cta;
  const int last_head = blockIdx.z == 0 && !p.joint ? p.q.heads : p.q.heads + p.k.heads;
  const int end_head = min(first_head + t.heads_per_cta, last_head);
  const int64_t flat_token = static_cast<int64_t>(blockIdx.x) * t.token_lanes + token_lane;
  if (flat_token >= static_cast<int64_t>(p.batch) * own.seqlen) return;
  const int batch = static_cast<unsigned>(flat_token) / static_cast<unsigned>(own.seqlen);
  const int token = static_cast<int>(flat_token) - batch * own.seqlen;

  int64_t position = own.first_position + token;
  if (own.positions != nullptr) {
    const int64_t at = batch * own.positions_batch_stride + token * own.positions_token_stride;
    position = p.positions_int64 ? static_cast<const int64_t*>(own.positions)[at]
                                 : static_cast<const int32_t*>(own.positions)[at];
  }
  const bool known = position >= 0 && position < p.cos_rows;
  const int64_t cos_row = batch * p.cos_batch_stride + position * p.cos_row_stride;
  const int64_t sin_row = batch * p.sin_batch_stride + position * p.sin_row_stride;

  // Bases from which head h of the joint numbering lies at h * stride.
  const T* q_in = static_cast<const T*>(p.q.in) + batch * p.q.batch_stride + token * p.q.token_stride;
  const T* k_in = static_cast<const T*>(p.k.in) + batch * p.k.batch_stride + token * p.k.token_stride
                  - p.q.heads * p.k.head_stride;
  T* q_out = static_cast<T*>(p.q.out) + flat_token * p.q.heads * p.head_dim;
  T* k_out = static_cast<T*>(p.k.out) + (flat_token * p.k.heads - p.q.heads) * p.head_dim;

  for (int item = item_lane; item < t.items; item += t.item_lanes) {
    const bool turns = item < t.rotated_items;
    int first, second;                        // channels of the item's two vectors
    float cosine[VEC], sine[VEC];
    if (turns) {
      const bool single_pair = INTERLEAVED && VEC == 1;
      first = single_pair ? 2 * item : item * VEC;
      second = single_pair ? first + 1 : p.rotary_dim / 2 + first;
      if (!known) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) cosine[i] = sine[i] = __int_as_float(0x7fffffff);
      } else if constexpr (INTERLEAVED && VEC > 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pair = (half == 0 ? first : second) / 2;
          load_angles<VEC / 2>(p.cos_type, p.cos, cos_row + pair, cosine + half * (VEC / 2));
          load_angles<VEC / 2>(p.cos_type, p.sin, sin_row + pair, sine + half * (VEC / 2));
        }
      } else {
        load_angles<VEC>(p.cos_type, p.cos, cos_row + item * VEC, cosine);
        load_angles<VEC>(p.cos_type, p.sin, sin_row + item * VEC, sine);
      }
      if (p.inverse) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) sine[i] = -sine[i];
      }
    } else {
      first = p.rotary_dim + (item - t.rotated_items) * VEC;
      second = first + (t.items - t.rotated_items) * VEC;
    }
    const bool has_second = second < p.head_dim;

    // All loads of UNROLL heads first, then the arithmetic and the stores.
    for (int head = first_head + head_lane; head < end_head; head += UNROLL * t.head_lanes) {
      Bits<T, VEC> a[UNROLL], b[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int h = head + u * t.head_lanes;
        if (h < end_head) {
          const T* x = h < p.q.heads ? q_in + h * p.q.head_stride : k_in + h * p.k.head_stride;
          a[u] = *reinterpret_cast<const Bits<T, VEC>*>(x + first);
          if (has_second) b[u] = *reinterpret_cast<const Bits<T, VEC>*>(x + second);
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int h = head + u * t.head_lanes;
        if (h < end_head) {
          if (turns) rotate<T, VEC, INTERLEAVED>(a[u], b[u], cosine, sine);
          T* y = (h < p.q.heads ? q_out : k_out) + static_cast<int64_t>(h) * p.head_dim;
          *reinterpret_cast<Bits<T, VEC>*>(y + first) = a[u];
          if (has_second) *reinterpret_cast<Bits<T, VEC>*>(y + second) = b[u];
        }
      }
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, int VEC>
cudaError_t launch(const RopeParams& p, cudaStream_t stream) {
  Tiling t;
  t.rotated_items = p.rotary_dim / 2 / VEC;
  t.items = t.rotated_items + static_cast<int>(ceil_div((p.head_dim - p.rotary_dim) / VEC, 2));
  t.item_lanes = std::min(t.items, kThreads);
  const int heads = p.joint ? p.q.heads + p.k.heads : std::max(p.q.heads, p.k.heads);
  if (heads == 0) return cudaSuccess;
  t.head_lanes = std::clamp(32 / t.item_lanes, 1, heads);
  t.token_lanes = std::max(1, kThreads / (t.item_lanes * t.head_lanes));

  const int64_t q_tokens = static_cast<int64_t>(p.batch) * p.q.seqlen, k_tokens = static_cast<int64_t>(p.batch) * p.k.seqlen;
  const int64_t tokens = std::max(q_tokens, k_tokens);
  if (tokens > INT32_MAX) return cudaErrorInvalidValue;
  if (tokens == 0 || t.items == 0) return cudaSuccess;
  const int64_t token_blocks = ceil_div(tokens, t.token_lanes);

  // Few tokens (decoding, short prompts): the heads are spread over more CTAs, down to one turn of the loop each.
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t turn = static_cast<int64_t>(t.head_lanes) * UNROLL, turns = ceil_div(heads, turn);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(16LL * processors, token_blocks), 1, turns);
  t.heads_per_cta = static_cast<int>(ceil_div(turns, wanted) * turn);

  const dim3 grid(static_cast<unsigned>(token_blocks), static_cast<unsigned>(ceil_div(heads, t.heads_per_cta)), p.joint ? 1 : 2);
  const int threads = t.item_lanes * t.head_lanes * t.token_lanes;
  if (p.interleaved) rope_kernel<T, VEC, true><<<grid, threads, 0, stream>>>(p, t);
  else rope_kernel<T, VEC, false><<<grid, threads, 0, stream>>>(p, t);
  return cudaGetLastError();
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether every row of Q, K, cos and sin starts where a whole vector may: `vec` elements of Q, `vec` of cos.
bool vectors_fit(const RopeParams& p, int vec) {
  for (const RopeOperand* x : {&p.q, &p.k})
    if (!aligned(x->in, 16) || !aligned(x->out, 16) || x->batch_stride % vec || x->token_stride % vec || x->head_stride % vec)
      return false;
  for (int64_t stride : {p.cos_batch_stride, p.sin_batch_stride, p.cos_row_stride, p.sin_row_stride})
    if (stride % vec) return false;
  return aligned(p.cos, 16) && aligned(p.sin, 16) && p.head_dim % vec == 0 && p.rotary_dim / 2 % vec == 0;
}

template <typename T>
cudaError_t launch(const RopeParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  return vectors_fit(p, kVec) ? launch<T, kVec>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

cudaError_t launch_rope(const RopeParams& params, cudaStream_t stream) {
  switch (params.type) {
    case RopeType::bf16: return launch<__nv_bfloat16>(params, stream);
    case RopeType::fp16: return launch<__half>(params, stream);
    case RopeType::fp32: return launch<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace seal
