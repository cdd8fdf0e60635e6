// Checks at the boundary of the attention ops, one sentence each: op, argument, what was expected, what came. They repeat
// those of seal_ops/ops/checks.py that guard memory; a call that came through Python's fake kernels has passed all of them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace seal {

using at::Tensor;

// Raises ValueError unless `ok`.
#define SEAL_CHECK(ok, op, argument, expected, ...) \
  TORCH_CHECK_VALUE(ok, "seal::", op, ": ", argument, " must ", expected, ", got ", __VA_ARGS__)

inline void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool packed) {
  const char* layout = packed ? "have the layout [T, H, D] with cu_seqlens" : "have the layout [B, S, H, D] (or [T, H, D] with cu_seqlens)";
  const std::pair<const char*, const Tensor&> named[] = {{"q", q}, {"k", k}, {"v", v}};
  for (const auto& [name, t] : named) {
    SEAL_CHECK(t.dim() == (packed ? 3 : 4), op, name, layout, t.dim(), " dimensions ", t.sizes());
    SEAL_CHECK(t.scalar_type() == q.scalar_type(), op, name, "have q's dtype", t.scalar_type());
    SEAL_CHECK(t.device() == q.device(), op, name, "be on q's device", t.device());
    SEAL_CHECK(t.size(-1) == q.size(-1), op, name, "have q's head_dim", t.size(-1));
    SEAL_CHECK(packed || t.size(0) == q.size(0), op, name, "have q's batch size", t.size(0));
    SEAL_CHECK(t.size(-3) < (int64_t{1} << 30) && t.size(-2) < (1 << 16), op, name, "have fewer than 2^30 tokens and 2^16 heads", t.sizes());
  }
  SEAL_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, op, "q", "be bfloat16 or float16 on the cuda backend",
             q.scalar_type());
  SEAL_CHECK(q.size(-1) >= 8 && q.size(-1) <= 256 && q.size(-1) % 8 == 0, op, "q",
             "have a head_dim that is a multiple of 8 up to 256 on the cuda backend", q.size(-1));
  SEAL_CHECK(v.sizes() == k.sizes(), op, "v", "have k's shape", v.sizes());
  SEAL_CHECK(k.size(-2) >= 1 && q.size(-2) % k.size(-2) == 0, op, "q", "have a number of heads that is a multiple of k's", q.size(-2));
}

inline void check_cu_seqlens(const char* op, const Tensor& q, const Tensor& k, const std::optional<Tensor>& cu_seqlens,
                             const std::optional<Tensor>& cu_seqlens_k) {
  if (!cu_seqlens) {
    SEAL_CHECK(!cu_seqlens_k, op, "cu_seqlens_k", "come with cu_seqlens", "cu_seqlens=None");
    return;
  }
  const auto check = [&](const char* name, const Tensor& t) {
    SEAL_CHECK(t.scalar_type() == at::kInt && t.dim() == 1 && t.size(0) >= 1, op, name, "be int32 of shape [sequences + 1]",
               t.scalar_type(), " ", t.sizes());
    SEAL_CHECK(t.device() == q.device(), op, name, "be on q's device", t.device());
  };
  check("cu_seqlens", *cu_seqlens);
  if (cu_seqlens_k) {
    check("cu_seqlens_k", *cu_seqlens_k);
    SEAL_CHECK(cu_seqlens_k->size(0) == cu_seqlens->size(0), op, "cu_seqlens_k", "have cu_seqlens' shape", cu_seqlens_k->sizes());
  } else {
    SEAL_CHECK(k.size(0) == q.size(0), op, "cu_seqlens_k", "be given where k and q differ in tokens", "None");
  }
}

// scale (per_head: [H] and [rows, H], [rows, H, 1] are allowed) or offset; rows: batch rows or packed sequences.
inline void check_factor(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t rows, bool per_head) {
  if (!t) return;
  const int64_t heads = q.size(-2), head_dim = q.size(-1);
  SEAL_CHECK(t->scalar_type() == at::kFloat, op, name, "be float32", t->scalar_type());
  SEAL_CHECK(t->device() == q.device(), op, name, "be on q's device", t->device());
  const auto is = [&](std::initializer_list<int64_t> shape) { return t->sizes() == at::IntArrayRef(shape); };
  const bool channel = is({heads, head_dim}) || is({rows, heads, head_dim}) || is({1, heads, head_dim});
  const bool head = is({heads}) || is({rows, heads}) || is({rows, heads, 1}) || is({1, heads, 1});
  SEAL_CHECK(channel || (per_head && head), op, name,
             (per_head ? c10::str("have shape [", heads, "] (per head) or [", heads, ", ", head_dim, "] (per channel), or the same per batch row")
                       : c10::str("have shape [", heads, ", ", head_dim, "], or the same per batch row")),
             t->sizes());
}

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

// The mask as (keys to the left, keys to the right) of a query's own position; -1: unbounded.
inline std::pair<int32_t, int32_t> window_bounds(const char* op, bool causal, std::optional<int64_t> window) {
  int64_t left = -1, right = causal ? 0 : -1;
  if (window) {
    SEAL_CHECK(*window >= 1, op, "window", "be at least 1 (the keys a query sees, its own included)", *window);
    left = std::min<int64_t>(*window - 1, 1 << 30);
    right = causal ? 0 : left;
  }
  return {static_cast<int32_t>(left), static_cast<int32_t>(right)};
}

// The tensor as the copy engine can read it: last stride 1, data and other strides multiples of 16 bytes. Copies if it must.
inline Tensor aligned(const Tensor& t) {
  const int64_t elements = 16 / t.element_size();
  bool ready = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) ready = ready && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  return ready ? t : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace seal
