#include "checks.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

#include "text.h"

namespace seal {
namespace {

bool is_floating(at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf || t == at::kFloat || t == at::kDouble; }

// dtype of scale, offset, lse and their gradients.
at::ScalarType statistics(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) { return t.sizes() == at::IntArrayRef(shape); }

// "[3, 4] torch.float32 on cpu"
std::string kind(const Tensor& t) { return join(t.sizes(), " ", t.scalar_type(), " on ", t.device()); }

void check_qkv(Call& call) {
  const Tensor& q = *call.q;
  const std::string_view op = call.op;
  // `rope` takes no cu_seqlens and knows packed tensors by their rank.
  const bool by_rank = call.op == "rope";
  call.packed = by_rank ? q.dim() == 3 : call.cu_seqlens != nullptr;
  const char* layout = by_rank       ? "have the layout [B, S, H, D] or packed [T, H, D], as q"
                       : call.packed ? "have the layout packed [T, H, D] with cu_seqlens"
                                     : "have the layout [B, S, H, D] (or [T, H, D] with cu_seqlens)";
  const std::pair<const char*, const Tensor*> named[] = {{"q", call.q}, {"k", call.k}, {"v", call.v}};
  for (const auto& [name, tensor] : named) {
    if (tensor == nullptr) continue;
    const Tensor& t = *tensor;
    SEAL_CHECK(t.dim() == (call.packed ? 3 : 4), op, name, layout, t.dim(), " dimensions ", t.sizes());
    SEAL_CHECK(is_floating(t.scalar_type()), op, name, "be bfloat16, float16, float32 or float64", t.scalar_type());
    SEAL_CHECK(t.scalar_type() == q.scalar_type(), op, name, join("have q's dtype ", q.scalar_type()), t.scalar_type());
    SEAL_CHECK(t.device() == q.device(), op, name, join("be on q's device ", q.device()), t.device());
    SEAL_CHECK(t.size(-1) == q.size(-1), op, name, join("have q's head_dim ", q.size(-1)), t.size(-1));
    SEAL_CHECK(call.packed || t.size(0) == q.size(0), op, name, join("have q's batch size ", q.size(0)), t.size(0));
    const int64_t tokens = std::max<int64_t>(1, t.size(-3)), batch = call.packed ? 1 : t.size(0);
    SEAL_CHECK(tokens < (int64_t{1} << 30) && t.size(-2) < (1 << 16) && batch < (int64_t{1} << 31) / tokens, op, name,
               "have fewer than 2^30 tokens a row, 2^31 tokens in all and 2^16 heads", t.sizes());
  }
  SEAL_CHECK(q.size(-1) >= 1 && q.size(-1) <= 256, op, "q", "have a head_dim from 1 to 256", q.size(-1));
  call.rows = call.packed ? 1 : q.size(0);
  call.seqlen_q = q.size(-3), call.heads_q = q.size(-2), call.head_dim = q.size(-1);
  call.seqlen_k = call.k->size(-3), call.heads_k = call.k->size(-2);
  if (call.v == nullptr) return;
  SEAL_CHECK(call.v->sizes() == call.k->sizes(), op, "v", join("have k's shape ", call.k->sizes()), call.v->sizes());
  SEAL_CHECK(call.heads_k >= 1 && call.heads_q % call.heads_k == 0, op, "q",
             join("have a number of heads that is a multiple of k's ", call.heads_k), call.heads_q);
}

// int32 [sequences + 1]; its contents are read only where that needs no transfer from a device. Returns the longest sequence.
int64_t check_lengths(const Call& call, const char* name, const Tensor& t, int64_t total) {
  const std::string_view op = call.op;
  SEAL_CHECK(t.scalar_type() == at::kInt && t.dim() == 1 && t.size(0) >= 1, op, name, "be int32 of shape [sequences + 1]",
             t.scalar_type(), " ", t.sizes());
  SEAL_CHECK(t.device() == call.q->device(), op, name, join("be on q's device ", call.q->device()), t.device());
  int64_t longest = 0;
  if (!t.is_cpu()) return longest;
  const Tensor values = t.contiguous();
  const at::ArrayRef<int32_t> starts(values.const_data_ptr<int32_t>(), values.numel());
  bool rising = starts.front() == 0 && starts.back() == total;
  for (size_t n = 1; n < starts.size(); ++n) {
    rising = rising && starts[n - 1] <= starts[n];
    longest = std::max<int64_t>(longest, int64_t{starts[n]} - starts[n - 1]);
  }
  SEAL_CHECK(rising, op, name, join("start at 0, never fall and end at ", total, " (the packed tokens)"), starts);
  return longest;
}

void check_bound(const Call& call, const char* name, const std::optional<int64_t>& bound, int64_t longest) {
  SEAL_CHECK(!bound || *bound >= longest, call.op, name, join("be at least ", longest, " (the longest sequence)"), *bound);
}

void check_packing(Call& call) {
  const std::string_view op = call.op;
  if (!call.packed) {
    SEAL_CHECK(!call.cu_seqlens_k && !call.max_seqlen && !call.max_seqlen_k, op, "cu_seqlens_k, max_seqlen and max_seqlen_k",
               "come with cu_seqlens", "cu_seqlens=None");
    return;
  }
  const int64_t longest = check_lengths(call, "cu_seqlens", *call.cu_seqlens, call.seqlen_q);
  int64_t longest_k = longest;
  if (call.cu_seqlens_k) {
    longest_k = check_lengths(call, "cu_seqlens_k", *call.cu_seqlens_k, call.seqlen_k);
    SEAL_CHECK(call.cu_seqlens_k->sizes() == call.cu_seqlens->sizes(), op, "cu_seqlens_k",
               join("have cu_seqlens' shape ", call.cu_seqlens->sizes()), call.cu_seqlens_k->sizes());
  } else {
    SEAL_CHECK(call.seqlen_q == call.seqlen_k, op, "cu_seqlens_k",
               join("be given where k (", call.seqlen_k, " tokens) and q (", call.seqlen_q, ") differ"), "None");
  }
  check_bound(call, "max_seqlen", call.max_seqlen, longest);
  check_bound(call, "max_seqlen_k", call.max_seqlen_k, longest_k);
  call.rows = call.cu_seqlens->size(0) - 1;
}

// scale (per head too) or offset.
void check_factor(const Call& call, const char* name, const Tensor* tensor, bool per_head) {
  if (tensor == nullptr) return;
  const Tensor& t = *tensor;
  const int64_t rows = call.rows, heads = call.heads_q, head_dim = call.head_dim;
  const at::ScalarType expected = statistics(*call.q);
  SEAL_CHECK(t.scalar_type() == expected, call.op, name, join("be ", expected, " (with ", call.q->scalar_type(), " q)"), t.scalar_type());
  SEAL_CHECK(t.device() == call.q->device(), call.op, name, join("be on q's device ", call.q->device()), t.device());
  const bool channel = has_shape(t, {heads, head_dim}) || has_shape(t, {rows, heads, head_dim}) || has_shape(t, {1, heads, head_dim});
  const bool head = has_shape(t, {heads}) || has_shape(t, {rows, heads}) || has_shape(t, {rows, heads, 1}) || has_shape(t, {1, heads, 1});
  SEAL_CHECK(channel || (per_head && head), call.op, name,
             per_head ? join("have shape [", heads, "] (per head), [", heads, ", ", head_dim, "] (per channel) or, per batch row, [", rows,
                             ", ", heads, ", 1] or [", rows, ", ", heads, ", ", head_dim, "]")
                      : join("have shape [", heads, ", ", head_dim, "] or, per batch row, [", rows, ", ", heads, ", ", head_dim, "]"),
             t.sizes());
}

constexpr int32_t kUnbounded = Mask::kUnbounded;

// What `causal` and `window` say.
Mask shorthand(const Call& call) {
  const int32_t reach = call.window ? static_cast<int32_t>(std::min<int64_t>(*call.window - 1, kUnbounded)) : kUnbounded;
  return {-reach, call.causal ? 0 : reach, 0, -kUnbounded, kUnbounded, 0, kUnbounded, 0};
}

Mask checked_mask(const Call& call) {
  const std::string_view op = call.op;
  const at::IntArrayRef mask(call.mask);
  SEAL_CHECK(!call.window && call.causal, op, "mask", "come without window and causal=False", call.causal ? "window" : "causal=False");
  SEAL_CHECK(mask.size() == 8, op, "mask",
             "have 8 integers (lower, upper, chunk, chunk_lower, chunk_upper, shift, shifted_from, sinks)",
             static_cast<int64_t>(mask.size()));
  const bool fits = std::all_of(mask.begin(), mask.end(), [](int64_t n) { return n >= -kUnbounded && n <= kUnbounded; });
  SEAL_CHECK(fits, op, "mask", "have integers from -2^30 to 2^30", mask);
  const auto at = [&](size_t n) { return static_cast<int32_t>(mask[n]); };
  Mask v{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
  SEAL_CHECK(v.lower <= v.upper && v.chunk_lower <= v.chunk_upper, op, "mask", "have lower <= upper and chunk_lower <= chunk_upper", mask);
  SEAL_CHECK(v.chunk >= 0 && v.sinks >= 0 && v.shifted_from >= 0 && v.shift >= 0 && v.shift < std::max(v.chunk, 1), op, "mask",
             "have chunk, shifted_from and sinks of at least 0, and a shift from 0 to below chunk", mask);
  const int64_t group = call.heads_q / call.heads_k;
  SEAL_CHECK(v.shift == 0 || v.shifted_from >= call.heads_q || v.shifted_from % group == 0, op, "mask",
             join("shift whole groups of ", group, " query heads, those that share a key/value head"), "heads from ",
             int64_t{v.shifted_from}, " on");
  // Chunks that leave out no key of the band cost nothing.
  const bool later = v.chunk_upper < kUnbounded && !(v.upper <= 0 && v.chunk_upper >= 0);
  if (v.chunk_lower == -kUnbounded && !later) v.chunk = 0;
  return v;
}

void check_mask(Call& call) {
  call.sigma = call.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(call.head_dim)));
  SEAL_CHECK(std::isfinite(call.sigma), call.op, "softmax_scale", "be finite", call.sigma);
  if (call.window) {
    SEAL_CHECK(*call.window >= 1, call.op, "window", "be at least 1 (the keys a query sees, its own included)", *call.window);
  }
  call.visible = call.has_mask ? checked_mask(call) : shorthand(call);
}

// Which blocks of keys a block of queries visits.
void check_blocks(const Call& call) {
  if (call.blocks == nullptr) return;
  const std::string_view op = call.op;
  const Tensor& t = *call.blocks;
  const int64_t size = call.block_size, heads = call.heads_q, rows = call.rows;
  SEAL_CHECK(!call.packed, op, "blocks", "come without cu_seqlens", "packed sequences");
  SEAL_CHECK(size > 0 && size % 32 == 0 && size <= (1 << 20), op, "block_size", "be a multiple of 32 up to 2^20", size);
  SEAL_CHECK(t.scalar_type() == at::kBool, op, "blocks", "be torch.bool", t.scalar_type());
  SEAL_CHECK(t.device() == call.q->device(), op, "blocks", join("be on q's device ", call.q->device()), t.device());
  const int64_t blocks_q = (call.seqlen_q + size - 1) / size, blocks_k = (call.seqlen_k + size - 1) / size;
  const bool fits = t.dim() == 4 && (t.size(0) == rows || t.size(0) == 1) && (t.size(1) == heads || t.size(1) == 1) &&
                    t.size(2) == blocks_q && t.size(3) == blocks_k;
  SEAL_CHECK(fits, op, "blocks", join("have shape [", rows, " or 1, ", heads, " or 1, ", blocks_q, ", ", blocks_k, "]"), t.sizes());
}

// What follows the softmax, and the cap of its scores.
void check_terms(const Call& call) {
  const std::string_view op = call.op;
  const bool known = call.gate_function == "sigmoid" || call.gate_function == "softplus";
  SEAL_CHECK(known, op, "gate_function", "be one of sigmoid, softplus", join("'", call.gate_function, "'"));
  const std::pair<const char*, const Tensor*> named[] = {{"sink", call.sink}, {"gate", call.gate}};
  for (const auto& [name, t] : named) {
    if (t == nullptr) continue;
    SEAL_CHECK(is_floating(t->scalar_type()), op, name, "be bfloat16, float16, float32 or float64", t->scalar_type());
    SEAL_CHECK(t->device() == call.q->device(), op, name, join("be on q's device ", call.q->device()), t->device());
    SEAL_CHECK(!call.offset, op, "offset", join("be None with a ", name, " (add it to the output)"), call.offset->sizes());
  }
  SEAL_CHECK(!call.sink || has_shape(*call.sink, {call.heads_q}), op, "sink",
             join("have shape [", call.heads_q, "] (one logit a query head)"), call.sink->sizes());
  at::DimVector one(call.q->sizes().begin(), call.q->sizes().end());
  one.back() = 1;
  SEAL_CHECK(!call.gate || call.gate->sizes() == call.q->sizes() || call.gate->sizes() == at::IntArrayRef(one), op, "gate",
             join("have q's shape ", call.q->sizes(), " or ", at::IntArrayRef(one)), call.gate->sizes());
  SEAL_CHECK(!call.softcap || (std::isfinite(*call.softcap) && *call.softcap > 0), op, "softcap", "be finite and above 0", *call.softcap);
}

void check_positions(const Call& call, const char* name, const Tensor* positions, int64_t seqlen) {
  if (positions == nullptr) return;
  const Tensor& t = *positions;
  const int64_t batch = call.packed ? 1 : call.q->size(0);
  SEAL_CHECK(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, call.op, name, "be int32 or int64", t.scalar_type());
  SEAL_CHECK(t.device() == call.q->device(), call.op, name, join("be on q's device ", call.q->device()), t.device());
  const bool row = has_shape(t, {seqlen}), all = !call.packed && (has_shape(t, {batch, seqlen}) || has_shape(t, {1, seqlen}));
  SEAL_CHECK(row || all, call.op, name,
             call.packed ? join("have shape [", seqlen, "]") : join("have shape [", seqlen, "] or [", batch, ", ", seqlen, "]"), t.sizes());
  if (!t.is_cpu() || t.numel() == 0) return;
  const int64_t low = t.min().item<int64_t>(), high = t.max().item<int64_t>();
  SEAL_CHECK(low >= 0 && high < call.cos->size(0), call.op, name, join("lie from 0 to ", call.cos->size(0) - 1, " (the rows of cos)"),
             low, " to ", high);
}

void check_rotation(const Call& call) {
  const std::string_view op = call.op;
  SEAL_CHECK(call.cos || !(call.sin || call.positions || call.positions_k), op, "cos", "be given where sin or positions are", "None");
  if (!call.cos) return;
  SEAL_CHECK(call.sin, op, "sin", "be given where cos is", "None");
  const Tensor &cos = *call.cos, &sin = *call.sin;
  const std::pair<const char*, const Tensor&> named[] = {{"cos", cos}, {"sin", sin}};
  for (const auto& [name, t] : named) {
    SEAL_CHECK(is_floating(t.scalar_type()), op, name, "be bfloat16, float16, float32 or float64", t.scalar_type());
    SEAL_CHECK(t.device() == call.q->device(), op, name, join("be on q's device ", call.q->device()), t.device());
    SEAL_CHECK(t.dim() == 2 || (t.dim() == 3 && !call.packed), op, name, "have shape [N, R/2] (a table) or, for dense q, [B, S, R/2]", t.sizes());
    SEAL_CHECK(t.sizes() == cos.sizes(), op, name, join("have cos' shape ", cos.sizes()), t.sizes());
  }
  const int64_t half = cos.size(-1), sq = call.seqlen_q, sk = call.seqlen_k, longest = std::max(sq, sk);
  SEAL_CHECK(half >= 1 && 2 * half <= call.head_dim, op, "cos",
             join("turn at most head_dim ", call.head_dim, " channels (last size R/2 from 1 to ", call.head_dim / 2, ")"), half);
  if (cos.dim() == 3) {
    SEAL_CHECK(!call.positions && !call.positions_k, op, "positions", "be None with cos and sin already gathered per token [B, S, R/2]",
               "positions");
    SEAL_CHECK(sq == sk && cos.size(1) == sq && (cos.size(0) == 1 || cos.size(0) == call.q->size(0)), op, "cos",
               join("have shape [", call.q->size(0), " or 1, ", sq, ", R/2] with Sq = Sk"), cos.sizes(), " with Sk ", sk);
  } else if (!call.positions) {
    SEAL_CHECK(!call.positions_k, op, "positions", "be given where positions_k is", "None");
    SEAL_CHECK(!call.packed, op, "positions", "be given for packed q and k (int32 or int64 [T])", "None");
    SEAL_CHECK(cos.size(0) >= longest, op, "cos", join("have a row for each of ", longest, " positions"), cos.sizes());
  } else {
    SEAL_CHECK(call.positions_k || sq == sk, op, "positions_k", join("be given where Sq (", sq, ") and Sk (", sk, ") differ"), "None");
    check_positions(call, "positions", call.positions, sq);
    check_positions(call, "positions_k", call.positions_k, sk);
  }
}

void check_backward(Call& call) {
  const std::string_view op = call.op;
  const Tensor& q = *call.q;
  const auto like = [&](const Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
    return t.sizes() == shape && t.scalar_type() == type && t.device() == q.device();
  };
  const std::pair<const char*, const Tensor*> outputs[] = {{"grad_out", call.grad_out}, {"out", call.out}};
  for (const auto& [name, t] : outputs) SEAL_CHECK(like(*t, q.sizes(), q.scalar_type()), op, name, join("be like q (", kind(q), ")"), kind(*t));
  const at::DimVector shape = call.packed ? at::DimVector{call.heads_q, call.seqlen_q} : at::DimVector{q.size(0), call.heads_q, call.seqlen_q};
  const std::pair<const char*, const Tensor*> rows[] = {{"lse", call.lse}, {"grad_lse", call.grad_lse}};
  for (const auto& [name, t] : rows)
    SEAL_CHECK(!t || like(*t, shape, statistics(q)), op, name,
               join("be ", at::IntArrayRef(shape), " ", statistics(q), " on ", q.device()), kind(*t));
  SEAL_CHECK(call.needs.size() == 5 || call.needs.size() == 7, op, "needs", "have 5 flags (q, k, v, scale, offset), or 7 (also sink, gate)",
             static_cast<int64_t>(call.needs.size()));
  call.needs_scale = call.needs[3] && call.scale;
  call.needs_offset = call.needs[4] && call.offset;
}

}  // namespace

void check(Call& call) {
  check_qkv(call);
  if (call.v) {
    check_packing(call);
    check_mask(call);
    check_blocks(call);
    check_factor(call, "scale", call.scale, true);
    check_factor(call, "offset", call.offset, false);
    check_terms(call);
  }
  check_rotation(call);
  if (call.grad_out) check_backward(call);
}

}  // namespace seal
