// Runs the kernels of decoding on the CPU (fibers.h) on one case after the other, each against attention in fp64. Exit code 0: all right.
#include "cuda/sm90/decode_combine.cuh"

using namespace seal;
using namespace seal::sm90;

namespace {

struct Case {
  int batch, queries, keys, heads, kv_heads, head_dim, splits, row_blocks;
  bool causal;
  int window;  // 0: none
  std::vector<int> cu_q, cu_k;  // packed
  Mask mask;                    // in place of causal and window, unless it sees everything

  Mask all() const {
    if (!mask.is_band()) return mask;
    Mask band;
    if (window) band.lower = 1 - window;
    band.upper = causal ? 0 : -band.lower;
    return band;
  }
};

// The definition (csrc/cuda/mask.h), word by word.
bool sees(const Mask& m, int head, int p, int j) {
  const auto chunk_of = [&](int x) { return int(floor((x + (head >= m.shifted_from ? m.shift : 0)) / double(m.chunk))); };
  const bool band = m.lower <= j - p && j - p <= m.upper;
  const auto chunks = [&] {
    const int distance = chunk_of(j) - chunk_of(p);
    return m.chunk_lower <= distance && distance <= m.chunk_upper;
  };
  return (band && (m.chunk == 0 || chunks())) || (j < m.sinks && j <= p);
}


template <class T>
struct Problem {
  static constexpr int kRoom = 3;  // tokens of NaN before and after each batch row

  explicit Problem(const Case& c)
      : c(c), packed(!c.cu_q.empty()), sequences(packed ? int(c.cu_q.size()) - 1 : c.batch), batch(packed ? 1 : c.batch),
        tokens_q(packed ? c.cu_q.back() : c.queries), tokens_k(packed ? c.cu_k.back() : c.keys), q(make(tokens_q, c.heads)),
        k(make(tokens_k, c.kv_heads)), v(make(tokens_k, c.kv_heads)), out(size_t(batch) * tokens_q * c.heads * c.head_dim, 0xffff),
        lse(size_t(batch) * tokens_q * c.heads, NAN), scale(size_t(sequences) * c.heads * c.head_dim), offset(size_t(c.heads) * c.head_dim), mask(c.all()) {
    for (float& x : scale) x = value();
    for (float& x : offset) x = value();
  }

  static float value() { return emulator::random() % 2001 / 500.f - 2.f; }
  std::vector<uint16_t> make(int tokens, int heads) const {
    std::vector<uint16_t> x(size_t(batch) * (tokens + 2 * kRoom) * heads * c.head_dim, 0xffff);
    for (int b = 0; b < batch; ++b) {
      for (int i = 0; i < tokens * heads * c.head_dim; ++i) x[at(tokens, heads, b, 0, 0, 0) + i] = bits_of<T>(value());
    }
    return x;
  }
  size_t at(int tokens, int heads, int b, int token, int head, int channel) const {
    return ((size_t(b) * (tokens + 2 * kRoom) + kRoom + token) * heads + head) * c.head_dim + channel;
  }
  AttentionTensor tensor(const std::vector<uint16_t>& x, int tokens, int heads) const {
    return {x.data() + at(tokens, heads, 0, 0, 0, 0), batch, tokens, heads, int64_t(tokens + 2 * kRoom) * heads * c.head_dim,
            int64_t(heads) * c.head_dim, c.head_dim};
  }
  CUtensorMap map(const std::vector<uint16_t>& x, int box_rows) const {
    const AttentionTensor t = tensor(x, tokens_k, c.kv_heads);
    return {static_cast<const uint16_t*>(t.data) - (packed ? box_rows * t.row_stride : 0),
            {c.head_dim, packed ? box_rows : t.rows, t.heads, packed ? t.rows + 1 : t.batch},
            {1, t.row_stride, t.head_stride, packed ? t.row_stride : t.batch_stride}};
  }

  // Largest relative error of a row of `out`, and largest error of the log-sum-exp.
  std::pair<double, double> errors() const {
    double worst = 0, worst_lse = 0;
    const int group = c.heads / c.kv_heads;
    for (int s = 0; s < sequences; ++s) {
      const int b = packed ? 0 : s, first_q = packed ? c.cu_q[s] : 0, first_k = packed ? c.cu_k[s] : 0;
      const int length_q = packed ? c.cu_q[s + 1] - first_q : c.queries, length_k = packed ? c.cu_k[s + 1] - first_k : c.keys;
      for (int i = 0; i < length_q; ++i) {
        for (int h = 0; h < c.heads; ++h) {
          const int position = i + length_k - length_q, token = first_q + i;
          std::vector<double> o(c.head_dim, 0.0);
          double total = 0;
          for (int j = 0; j < length_k; ++j) {
            if (!sees(mask, h, position, j)) continue;
            double score = 0;
            for (int d = 0; d < c.head_dim; ++d) {
              score += double(value_of<T>(q[at(tokens_q, c.heads, b, token, h, d)])) *
                       value_of<T>(k[at(tokens_k, c.kv_heads, b, first_k + j, h / group, d)]);
            }
            const double weight = exp(score / sqrt(double(c.head_dim)));
            total += weight;
            for (int d = 0; d < c.head_dim; ++d) o[d] += weight * value_of<T>(v[at(tokens_k, c.kv_heads, b, first_k + j, h / group, d)]);
          }
          double error = 0, norm = 0;
          for (int d = 0; d < c.head_dim; ++d) {
            const double want = (total > 0 ? o[d] / total : 0.0) * scale[(s * c.heads + h) * c.head_dim + d] + offset[h * c.head_dim + d];
            const double difference = value_of<T>(out[((size_t(b) * tokens_q + token) * c.heads + h) * c.head_dim + d]) - want;
            error += difference * difference;
            norm += want * want;
          }
          const auto larger = [](double a, double x) { return x == x ? max(a, x) : INFINITY; };
          worst = larger(worst, sqrt(error / norm));
          const double want = total > 0 ? log(total) : -INFINITY, got = lse[(size_t(b) * c.heads + h) * tokens_q + token];
          worst_lse = larger(worst_lse, want == got ? 0.0 : fabs(want - got));
        }
      }
    }
    return {worst, worst_lse};
  }

  const Case& c;
  const bool packed;
  const int sequences, batch, tokens_q, tokens_k;
  std::vector<uint16_t> q, k, v, out;
  std::vector<float> lse, scale, offset;
  const Mask mask;
};

// True where the kernels agree with fp64.
template <class Config>
bool right(const Case& c) {
  using T = typename Config::T;
  Problem<T> p(c);
  std::vector<float> partial(p.out.size() * c.splits, NAN), partial_lse(p.lse.size() * c.splits, NAN);
  DecodeArguments a = {};
  a.sequences = {p.packed ? c.cu_q.data() : nullptr, p.packed ? c.cu_k.data() : nullptr, p.sequences, p.tokens_q, p.tokens_k, p.mask};
  a.q = p.tensor(p.q, p.tokens_q, c.heads);
  a.out = {p.out.data(), p.batch, p.tokens_q, c.heads, int64_t(p.tokens_q) * c.heads * c.head_dim, int64_t(c.heads) * c.head_dim, c.head_dim};
  a.scale = {p.scale.data(), int64_t(c.heads) * c.head_dim, c.head_dim, 1};
  a.offset = {p.offset.data(), 0, c.head_dim, 1};
  a.kv_heads = c.kv_heads;
  a.group = c.heads / c.kv_heads;
  a.head_dim = c.head_dim;
  a.row_blocks = c.row_blocks;
  a.splits = c.splits;
  a.scale_log2 = 1 / sqrtf(c.head_dim) / kLn2;
  a.lse = p.lse.data();
  a.lse_head_stride = p.tokens_q;
  a.lse_sequence_stride = int64_t(c.heads) * p.tokens_q;
  if (c.splits > 1) {
    a.partial_out = partial.data();
    a.partial_lse = partial_lse.data();
  }
  const DecodeMaps maps = {p.map(p.k, Config::kBlockN), p.map(p.v, Config::kBlockN)};
  std::vector<uint8_t> memory(sizeof(DecodeShared<Config>) + 1024);
  emulator::shared_memory = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  for (int block = 0; block < c.row_blocks * c.kv_heads * c.splits * p.sequences; ++block) {
    memset(emulator::shared_memory, 0xff, sizeof(DecodeShared<Config>));
    emulator::run_block(block, Config::kThreads, [&] { attention_decode<Config>(maps, a); });
  }
  for (size_t block = 0; c.splits > 1 && block < p.lse.size(); ++block) {
    emulator::run_block(block, kCombineThreads, [&] { attention_decode_combine<T, Config::kHeadDim>(a); });
  }
  const auto [error, error_lse] = p.errors();
  const bool good = error < (std::is_same_v<T, __half> ? 1.5e-3 : 8e-3) && error_lse < 2e-5;
  printf("%s: %d x %d x %d, heads %d/%d of %d, %d splits, %d row tiles, window %d%s: out %.1e, lse %.1e\n", good ? "right" : "WRONG", c.batch, c.queries,
         c.keys, c.heads, c.kv_heads, c.head_dim, c.splits, Config::kRowTiles, c.window, p.packed ? ", packed" : "", error, error_lse);
  return good;
}

}  // namespace

int main() {
  using Bf16 = __nv_bfloat16;
  using Rows16 = DecodeConfig<Bf16, Masking::kBand, 128, 64, 3, 1, 4, 2>;
  using Rows64 = DecodeConfig<Bf16, Masking::kBand, 128, 128, 3, 4, 2, 1>;
  using Narrow = DecodeConfig<__half, Masking::kBand, 64, 128, 3, 1, 4, 2>;
  using Narrow80 = DecodeConfig<Bf16, Masking::kBand, 64, 128, 6, 5, 2, 1>;
  using Wide = DecodeConfig<Bf16, Masking::kBand, 256, 64, 3, 1, 4, 1>;
  const std::vector<int> cu_q = {0, 1, 6, 6, 30, 33, 34}, cu_k = {0, 200, 330, 350, 440, 440, 441};
  bool good = right<Rows16>({1, 1, 1, 4, 1, 128, 1, 1, true, 0});
  good &= right<Rows16>({2, 1, 701, 8, 2, 128, 3, 1, true, 0});
  good &= right<Rows16>({1, 4, 300, 8, 2, 80, 2, 1, true, 70});
  good &= right<Rows16>({1, 3, 130, 8, 2, 128, 40, 1, false, 33});
  good &= right<Rows16>({1, 5, 2, 4, 2, 128, 1, 1, true, 0});
  good &= right<Rows16>({1, 2, 0, 4, 2, 128, 2, 1, true, 0});
  good &= right<Rows16>({0, 0, 0, 4, 2, 128, 2, 1, true, 0, cu_q, cu_k});
  good &= right<Rows16>({0, 0, 0, 4, 2, 128, 1, 1, true, 50, cu_q, cu_k});
  good &= right<Rows64>({1, 3, 300, 40, 1, 120, 2, 1, true, 90});
  good &= right<Narrow>({1, 2, 999, 6, 2, 8, 2, 1, true, 0});
  good &= right<Narrow80>({1, 1, 300, 71, 1, 64, 2, 1, true, 0});
  good &= right<Wide>({1, 2, 200, 4, 2, 192, 2, 1, true, 0});
  good &= right<Wide>({0, 0, 0, 4, 2, 136, 1, 1, true, 0, {0, 1, 3}, {0, 100, 250}});
  // Masks with sinks and chunks: sinks in a block of their own and beside the band, more sinks than a block, heads shifted, chunks
  // that the sequence's alignment to the end cuts, rows that see nothing.
  using General16 = DecodeConfig<Bf16, Masking::kGeneral, 128, 64, 3, 1, 4, 2>;
  using General64 = DecodeConfig<Bf16, Masking::kGeneral, 128, 128, 3, 4, 2, 1>;
  using GeneralWide = DecodeConfig<Bf16, Masking::kGeneral, 256, 64, 3, 1, 4, 1>;
  constexpr int kAll = Mask::kUnbounded;
  const Mask streaming{1 - 130, 0, 0, -kAll, kAll, 0, kAll, 4}, many_sinks{1 - 50, 0, 0, -kAll, kAll, 0, kAll, 70};
  const Mask groups{-kAll, 0, 60, 0, 0, 30, 4, 3}, before{-kAll, 0, 50, -1, -1, 0, kAll, 0}, earlier{-kAll, 0, 40, -kAll, -2, 0, kAll, 0};
  const Mask ahead{2, 9, 0, -kAll, kAll, 0, kAll, 5};
  good &= right<General16>({2, 1, 701, 8, 2, 128, 3, 1, true, 0, {}, {}, streaming});
  good &= right<General16>({1, 4, 300, 8, 2, 80, 2, 1, true, 0, {}, {}, many_sinks});
  good &= right<General16>({1, 4, 100, 8, 2, 128, 1, 1, true, 0, {}, {}, many_sinks});
  good &= right<General16>({1, 3, 211, 8, 2, 128, 2, 1, true, 0, {}, {}, groups});
  good &= right<General16>({1, 5, 2, 4, 2, 128, 1, 1, true, 0, {}, {}, groups});
  good &= right<General64>({1, 12, 310, 8, 2, 128, 2, 1, true, 0, {}, {}, before});
  good &= right<General64>({1, 12, 310, 8, 2, 128, 3, 1, true, 0, {}, {}, earlier});
  good &= right<General16>({1, 7, 90, 8, 2, 128, 2, 1, true, 0, {}, {}, ahead});
  good &= right<General16>({0, 0, 0, 8, 2, 128, 2, 1, true, 0, cu_q, cu_k, streaming});
  good &= right<General16>({0, 0, 0, 8, 2, 128, 2, 1, true, 0, cu_q, cu_k, groups});
  good &= right<GeneralWide>({1, 2, 400, 4, 2, 192, 2, 1, true, 0, {}, {}, streaming});
  return good ? 0 : 1;
}
