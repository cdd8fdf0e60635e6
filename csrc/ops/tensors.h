// Tensors as the kernels read them: copies where a layout cannot be read, strides of factors, tables of cos and sin.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace seal {

using at::Tensor;

// Strides (batch, head, channel) of a scale or offset of any of the allowed shapes, in elements; 0 where it broadcasts.
struct FactorStrides {
  int64_t batch = 0, head = 0, channel = 0;
};
inline FactorStrides factor_strides(const Tensor& t, int64_t heads, int64_t head_dim) {
  if (t.dim() == 1) return {0, t.stride(0), 0};
  if (t.dim() == 2 && t.size(0) == heads && t.size(1) == head_dim) return {0, t.stride(0), t.stride(1)};  // the first reading of a 2-d scale
  if (t.dim() == 2) return {t.stride(0), t.stride(1), 0};
  return {t.size(0) > 1 ? t.stride(0) : 0, t.stride(1), t.size(2) > 1 ? t.stride(2) : 0};
}

// The tensor as the copy engine can read it: last stride 1, data and other strides multiples of 16 bytes. Copies if it must.
inline Tensor aligned(const Tensor& t) {
  const int64_t elements = 16 / t.element_size();
  bool ready = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) ready = ready && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  return ready ? t : t.clone(at::MemoryFormat::Contiguous);
}

inline Tensor unit_last_stride(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

inline Tensor contiguous(const Tensor* t) { return t ? t->contiguous() : Tensor(); }

template <typename T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// cos and sin in one dtype that the kernels read (bf16, fp16, fp32), last stride 1; any other pair is converted to fp32.
struct RotationTables {
  Tensor cos, sin;

  RotationTables(const Tensor& cos_in, const Tensor& sin_in) {
    const auto found = cos_in.scalar_type();
    const bool readable = found == sin_in.scalar_type() && (found == at::kBFloat16 || found == at::kHalf);
    const auto type = readable ? found : at::kFloat;
    cos = unit_last_stride(cos_in.to(type));
    sin = unit_last_stride(sin_in.to(type));
  }
  // Of values per token [B, S, R/2]; 0 where every batch row reads the same.
  static int64_t batch_stride(const Tensor& t) { return t.dim() == 3 && t.size(0) > 1 ? t.stride(0) : 0; }
};

// Positions [S] or [B, S] (packed [T]): 0 as batch stride where every batch row stands at the same ones.
inline int64_t positions_batch_stride(const Tensor& t) { return t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : 0; }

}  // namespace seal
