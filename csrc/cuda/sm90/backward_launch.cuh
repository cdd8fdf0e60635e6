// The launches of one head_dim and dtype. attention_backward_hd*.cu instantiate them, so that they compile side by side.
#pragma once

#include <algorithm>

#include "backward_kernel.cuh"
#include "backward_query.cuh"
#include "backward_rows.cuh"
#include "backward_wide.cuh"

namespace seal::sm90 {

#define SEAL_RETURN_IF_ERROR(call)                     \
  do {                                                 \
    const cudaError_t status_ = (call);                \
    if (status_ != cudaSuccess) return status_;        \
  } while (0)

// A kernel that follows another one of ours in the stream: it may start while that one ends, and waits for it itself
// (wait_for_dependencies). The first kernel, and one behind a memset, are launched in the ordinary way.
template <class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline TileSource tile_source(const BackwardKernelParams& p, const BackwardTensor& t, int rows, int heads) {
  return {t.data, p.cu_seqlens_q != nullptr ? 1 : p.batch, rows, heads, p.head_dim, t.batch_stride, t.row_stride, t.head_stride};
}

inline cudaError_t make_maps(BackwardMaps* maps, const BackwardKernelParams& p, int query_rows, int key_rows) {
  const bool packed = p.cu_seqlens_q != nullptr;
  SEAL_RETURN_IF_ERROR(make_tile_map(&maps->q, tile_source(p, p.q, p.seqlen_q, p.heads_q), p.half, packed, query_rows));
  const int64_t row = static_cast<int64_t>(p.heads_q) * p.head_dim;
  const BackwardTensor scaled_grad{p.scaled_grad, row * p.seqlen_q, row, p.head_dim};
  const BackwardTensor& grad_out = p.scaled_grad != nullptr ? scaled_grad : p.grad_out;
  SEAL_RETURN_IF_ERROR(make_tile_map(&maps->grad_out, tile_source(p, grad_out, p.seqlen_q, p.heads_q), p.half, packed, query_rows));
  SEAL_RETURN_IF_ERROR(make_tile_map(&maps->unscaled_grad_out, tile_source(p, p.grad_out, p.seqlen_q, p.heads_q), p.half, packed, query_rows));
  SEAL_RETURN_IF_ERROR(make_tile_map(&maps->k, tile_source(p, p.k, p.seqlen_k, p.heads_k), p.half, packed, key_rows));
  return make_tile_map(&maps->v, tile_source(p, p.v, p.seqlen_k, p.heads_k), p.half, packed, key_rows);
}

// A kernel that walks through the tiles of the other side, on `grid` thread blocks.
template <class Config, class Shared>
cudaError_t launch_walk(void (*kernel)(BackwardKernelParams, BackwardMaps), const BackwardKernelParams& p, unsigned grid, cudaStream_t stream) {
  BackwardMaps maps;
  SEAL_RETURN_IF_ERROR(make_maps(&maps, p, Config::kBlockM, Config::kBlockN));
  constexpr int kBytes = sizeof(Shared) + 1024;  // aligned by the kernel
  SEAL_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  return launch_dependent(kernel, dim3(grid), Config::kThreads, kBytes, stream, p, maps);
}

template <class T, int kD, BackwardWork kWork, Masking kMasking, bool kOrdered = false>
cudaError_t launch_main(const BackwardKernelParams& p, cudaStream_t stream) {
  const unsigned tasks = static_cast<unsigned>(p.task_count);
  if constexpr (kD == 256) {
    using Config = WideConfig<T, kWork, kMasking>;
    return launch_walk<Config, WideShared<Config>>(attention_backward_wide<Config>, p, tasks, stream);
  } else {
    using Config = BackwardConfig<T, kD, kWork, kMasking, kOrdered>;
    return launch_walk<Config, BackwardShared<Config>>(attention_backward_main<Config>, p, std::min<unsigned>(tasks, p.multiprocessors), stream);
  }
}

template <class T, int kD, Masking kMasking>
cudaError_t launch_query(const BackwardKernelParams& p, cudaStream_t stream) {
  using Config = QueryConfig<T, kD, kMasking>;
  const unsigned tiles = static_cast<unsigned>(p.tile_count_q * p.heads_q);
  return launch_walk<Config, QueryShared<Config>>(attention_backward_query<Config>, p, tiles, stream);
}

template <class T, int kD, int kRows, bool kSplitRows>
cudaError_t launch_tiles(const BackwardKernelParams& p, const AccumulatorTiles& t, cudaStream_t stream) {
  constexpr int kBytes = kRows * (kD + kPad) * 4;
  void (*const kernel)(BackwardKernelParams, AccumulatorTiles) = attention_backward_tiles<T, kD, kRows, kSplitRows>;
  SEAL_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const int64_t tiles = t.of_queries ? p.tile_count_q * (kTileRows / kRows) : p.tile_count_k * (p.key_rows / kRows);
  return launch_dependent(kernel, dim3(static_cast<unsigned>(tiles * t.heads)), kRowThreads, kBytes, stream, p, t);
}

template <int kD>
cudaError_t sum_offset(const BackwardKernelParams& p, cudaStream_t stream) {
  if (p.grad_offset == nullptr) return cudaSuccess;
  void (*const kernel)(BackwardKernelParams, float*, bool, bool) = attention_backward_sum<kD, FactorGradient::kOffset>;
  return launch_dependent(kernel, dim3(p.heads_q, p.grad_offset_per_batch ? p.batch : 1), kSumThreads, 0, stream, p, p.grad_offset,
                          p.grad_offset_per_batch, true);
}

template <int kD>
cudaError_t sum_scale(const BackwardKernelParams& p, cudaStream_t stream) {
  if (p.grad_scale == nullptr) return cudaSuccess;
  void (*const kernel)(BackwardKernelParams, float*, bool, bool) = attention_backward_sum<kD, FactorGradient::kScale>;
  return launch_dependent(kernel, dim3(p.heads_q, p.grad_scale_per_batch ? p.batch : 1), kSumThreads, 0, stream, p, p.grad_scale,
                          p.grad_scale_per_batch, p.grad_scale_per_channel);
}

// All products, of calls whose mask kMasking stands for. attention_backward_masked_hd*.cu instantiate kGeneral.
template <class T, int kD, Masking kMasking>
cudaError_t launch_products(const BackwardKernelParams& p, cudaStream_t stream) {
  if (p.dq != nullptr) {
    if constexpr (kD < 256) {
      if (p.added == nullptr) {
        SEAL_RETURN_IF_ERROR((launch_main<T, kD, BackwardWork::kAll, kMasking>(p, stream)));
      } else if constexpr (kMasking == Masking::kBand) {
        SEAL_RETURN_IF_ERROR((launch_main<T, kD, BackwardWork::kAll, kMasking, true>(p, stream)));
      }
    }
  } else if (p.grad_k != nullptr) {
    SEAL_RETURN_IF_ERROR((launch_main<T, kD, BackwardWork::kKeyValue, kMasking>(p, stream)));
  } else if (p.grad_v != nullptr) {
    SEAL_RETURN_IF_ERROR((launch_main<T, kD, BackwardWork::kValue, kMasking>(p, stream)));
  } else if (p.grad_scale != nullptr) {
    SEAL_RETURN_IF_ERROR((launch_main<T, kD, BackwardWork::kScale, kMasking>(p, stream)));
  }
  return p.grad_q != nullptr && p.dq == nullptr ? launch_query<T, kD, kMasking>(p, stream) : cudaSuccess;
}

template <class T, int kD>
cudaError_t launch_backward(const BackwardKernelParams& p, cudaStream_t stream) {
  const bool any_rows = p.seqlen_q > 0, any_keys = p.seqlen_k > 0;
  if (any_rows) {
    const dim3 grid(static_cast<unsigned>(p.tile_count_q * p.heads_q));
    if (p.scale != nullptr) {
      attention_backward_rows<T, kD, true><<<grid, kRowThreads, 0, stream>>>(p);
    } else {
      attention_backward_rows<T, kD, false><<<grid, kRowThreads, 0, stream>>>(p);
    }
    SEAL_RETURN_IF_ERROR(cudaGetLastError());
  }
  if (!any_rows || !any_keys) {  // no products: only the gradient of the offset may be more than zero
    if (any_rows) SEAL_RETURN_IF_ERROR(sum_offset<kD>(p, stream));  // behind the kernel, not behind the memsets (launch_dependent)
    const auto clear = [&](void* data, int64_t rows, int64_t heads, int64_t bytes) {
      return data == nullptr ? cudaSuccess : cudaMemsetAsync(data, 0, static_cast<size_t>(rows * heads * bytes), stream);
    };
    const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch, row = 2 * p.head_dim;
    SEAL_RETURN_IF_ERROR(clear(p.grad_q, batch * p.seqlen_q, p.heads_q, row));
    SEAL_RETURN_IF_ERROR(clear(p.grad_k, batch * p.seqlen_k, p.heads_k, row));
    SEAL_RETURN_IF_ERROR(clear(p.grad_v, batch * p.seqlen_k, p.heads_k, row));
    SEAL_RETURN_IF_ERROR(clear(p.grad_scale, p.grad_scale_per_batch ? p.batch : 1, p.heads_q, p.grad_scale_per_channel ? 4 * p.head_dim : 4));
    return any_rows ? cudaSuccess : clear(p.grad_offset, p.grad_offset_per_batch ? p.batch : 1, p.heads_q, 4 * p.head_dim);
  }
  SEAL_RETURN_IF_ERROR((p.mask.is_band() ? launch_products<T, kD, Masking::kBand>(p, stream) : launch_products<T, kD, Masking::kGeneral>(p, stream)));
  const bool rotate = p.cos != nullptr;
  if (p.dq != nullptr) {
    const AccumulatorTiles t{p.dq, 0, p.padded_rows_q * kD, 1, p.heads_q, true, p.grad_q, p.softmax_scale, rotate};
    SEAL_RETURN_IF_ERROR((launch_tiles<T, kD, step_rows(kD), step_rows(kD) == 128>(p, t, stream)));
  }
  if (p.splits > 1) {
    constexpr int kRows = key_rows(kD);
    const int64_t head_stride = p.tile_count_k * kRows * kD;
    AccumulatorTiles t{p.dk_partial, p.heads_k * head_stride, head_stride, p.splits, p.heads_k, false, p.grad_k, p.softmax_scale, rotate};
    if (p.grad_k != nullptr) SEAL_RETURN_IF_ERROR((launch_tiles<T, kD, kRows, kRows == 128>(p, t, stream)));
    t.data = p.dv_partial;
    t.output = p.grad_v;
    t.factor = 1.f;
    t.rotate = false;
    if (p.grad_v != nullptr) SEAL_RETURN_IF_ERROR((launch_tiles<T, kD, kRows, kRows == 128>(p, t, stream)));
  }
  SEAL_RETURN_IF_ERROR(sum_scale<kD>(p, stream));
  return sum_offset<kD>(p, stream);
}

}  // namespace seal::sm90
