// The walks of csrc/cuda/mask.h against the definition of a mask, pair by pair, on random masks, lengths and tiles. Usage: mask
// <cases> <seed>. Exit code 0: all right; else the first fault is described.
#include "cuda/mask.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

using namespace seal;

namespace {

std::mt19937 generator;
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
bool chance(double p) { return std::uniform_real_distribution<>()(generator) < p; }

int64_t floor_divided(int64_t x, int64_t by) { return x >= 0 ? x / by : -((by - 1 - x) / by); }

// The definition, word by word.
bool sees(const Mask& m, int head, int p, int j) {
  const int64_t distance = int64_t{j} - p;
  bool seen = m.lower <= distance && distance <= m.upper;
  if (m.chunk > 0) {
    const int shift = head >= m.shifted_from ? m.shift : 0;
    const int64_t chunks = floor_divided(int64_t{j} + shift, m.chunk) - floor_divided(int64_t{p} + shift, m.chunk);
    seen = seen && m.chunk_lower <= chunks && chunks <= m.chunk_upper;
  }
  return seen || (j < m.sinks && j <= p);
}

int bound() { return chance(0.25) ? 0 : between(-40, 40) * (chance(0.3) ? 8 : 1); }

Mask random_mask(bool band) {
  Mask m;
  if (chance(0.7)) m.upper = bound();
  if (chance(0.6)) m.lower = std::min(m.upper, chance(0.8) ? std::min(m.upper, 0) - between(0, 200) : bound());
  if (band) return m;
  if (chance(0.6)) {
    m.chunk = chance(0.1) ? 1 << between(0, 30) : between(1, chance(0.5) ? 20 : 200);
    if (chance(0.8)) m.chunk_upper = chance(0.6) ? 0 : between(-3, 2);
    if (chance(0.7)) m.chunk_lower = std::min(m.chunk_upper, chance(0.5) ? 0 : between(-3, 1));
    m.shift = chance(0.5) ? between(0, m.chunk - 1) : 0;
    m.shifted_from = between(0, 3);
  }
  if (m.chunk == 0 || chance(0.4)) m.sinks = chance(0.05) ? Mask::kUnbounded : between(1, chance(0.5) ? 8 : 150);
  return m;
}

struct Fault {
  const char* what;
  int a, b;
};

// A tile of `rows` queries from `row` on, of which part [part_row, part_row + part_rows) is one warpgroup's.
template <int kKeys, Masking kMasking>
void check_keys(const Mask& m, int head, int length_q, int length_k, int row, int rows, int part_rows) {
  const HeadMask<kMasking> mask(m, head);
  const int offset = length_k - length_q, last = std::min(row + rows, length_q) - 1;
  KeyTiles<kKeys, kMasking> tiles{};
  tiles.find(mask, row + offset, last + offset, length_k);
  std::set<int> places, needed;
  for (int n = tiles.begin; n < tiles.end; ++n) {
    const int place = tiles.place(n);
    if (place < 0 || place * kKeys >= length_k) throw Fault{"a tile without keys", n, place};
    if (!places.insert(place).second) throw Fault{"a tile twice", n, place};
    if (n > tiles.begin && place <= tiles.place(n - 1)) throw Fault{"tiles out of order", n, place};
  }
  for (int i = row; i <= last; ++i) {
    const Span keys = mask.keys(i + offset, length_k);
    const int sink_end = mask.sink_end(i + offset, length_k);
    for (int j = 0; j < length_k; ++j) {
      const bool seen = sees(m, head, i + offset, j);
      if (seen != ((j >= keys.begin && j < keys.end) || j < sink_end)) throw Fault{"the keys of a query", i, j};
      if (seen) needed.insert(j / kKeys);
    }
    if (keys.end > length_k || sink_end < 0 || sink_end > length_k) throw Fault{"keys outside the sequence", i, 0};
  }
  for (int place : needed) {
    if (!places.count(place)) throw Fault{"a tile that is seen is not visited", place, 0};
  }
  // Masks as methods use them (a band; or causal, with chunks at and before the query's own) visit no tile in vain at the ends.
  const bool causal_chunks = m.chunk > 0 && m.upper == 0 && m.lower <= -length_k && m.chunk_lower <= m.chunk_upper && m.chunk_upper <= 0;
  if (m.sinks == 0 && (m.chunk == 0 || causal_chunks) && m.lower <= m.upper && !places.empty()) {
    if (!needed.count(*places.begin())) throw Fault{"the first tile is not seen", *places.begin(), 0};
    if (!needed.count(*places.rbegin())) throw Fault{"the last tile is not seen", *places.rbegin(), 0};
  }
  if (m.sinks > 0 && m.sinks < kKeys && ((m.chunk == 0 && m.upper == 0) || causal_chunks) && places.size() > needed.size() + 1) throw Fault{"tiles in vain", tiles.begin, tiles.end};
  for (int first = row; first < row + rows; first += part_rows) {
    const int end = std::min(first + part_rows, length_q);  // may lie before first: a warpgroup without rows
    const auto part = tiles.part(mask, first + offset, end - 1 + offset, length_k);
    if (part.any() && (part.begin < tiles.begin || part.end > tiles.end)) throw Fault{"a part beyond the tiles", part.begin, part.end};
    if (end <= first && part.any()) throw Fault{"tiles of no query", part.begin, part.end};
    for (int n = tiles.begin; n < tiles.end; ++n) {
      const int place = tiles.place(n);
      bool some = false, all = true;
      int keys_end = 0;
      for (int i = first; i < end; ++i) {
        for (int j = place * kKeys; j < (place + 1) * kKeys; ++j) {
          const bool seen = j < length_k && sees(m, head, i + offset, j);
          some |= seen;
          all &= seen;
          if (seen) keys_end = std::max(keys_end, j + 1);
        }
      }
      if (some && (n < part.begin || n >= part.end)) throw Fault{"a part misses a tile", first, n};
      if (part.any() && n >= part.begin && n < part.end && part.whole(n) && !all) throw Fault{"a tile is not whole", first, n};
      if (part.any() && n == part.end - 1 && keys_end > part.keys_end) throw Fault{"keys_end", keys_end, part.keys_end};
      // Of a band every tile that is whole is known to be.
      if (kMasking == Masking::kBand && end > first && all && !part.whole(n)) throw Fault{"a whole tile is not known", first, n};
    }
  }
}

template <int kKeys, int kQueries, Masking kMasking>
void check_queries(const Mask& m, int head, int length_q, int length_k, int key) {
  const HeadMask<kMasking> mask(m, head);
  const int offset = length_k - length_q, last = std::min(key + kKeys, length_k) - 1;
  QueryTiles<kQueries, kMasking> tiles{};
  tiles.find(mask, key, last, length_q, length_k);
  if (tiles.begin < 0 || (tiles.end > tiles.begin && (tiles.end - 1) * kQueries >= length_q)) throw Fault{"query tiles outside", tiles.begin, tiles.end};
  bool any = false, ends = false;
  for (int t = 0; t * kQueries < length_q; ++t) {
    bool some = false, all = true;
    for (int i = t * kQueries; i < std::min((t + 1) * kQueries, length_q); ++i) {
      for (int j = key; j <= last; ++j) {
        const bool seen = sees(m, head, i + offset, j);
        const Span positions = mask.positions(j);
        if (seen != ((i + offset >= positions.begin && i + offset < positions.end) || (mask.is_sink(j) && i + offset >= j))) {
          throw Fault{"the queries of a key", i, j};
        }
        some |= seen;
        all &= seen;
      }
    }
    const bool inside = t >= tiles.begin && t < tiles.end, whole = t >= tiles.whole_begin && t < tiles.whole_end;
    any |= some;
    ends |= some && (t == tiles.begin || t == tiles.end - 1);
    if (some && !inside) throw Fault{"a query tile is not visited", key, t};
    if (inside && whole && !all) throw Fault{"a query tile is not whole", key, t};
    if (kMasking == Masking::kBand && inside && all && !whole) throw Fault{"a whole query tile is not known", key, t};
  }
  if (kMasking == Masking::kBand && tiles.end > tiles.begin && !ends) throw Fault{"query tiles where nothing is seen", tiles.begin, tiles.end};
  (void)any;
}

template <Masking kMasking>
void check(const Mask& mask, int head, int length_q, int length_k) {
  const Mask m = mask.within(length_q + between(0, 100), length_k + between(0, 100));
  for (int row = 0; row < length_q; row += 32) {
    check_keys<16, kMasking>(m, head, length_q, length_k, row, 32, 16);
    check_keys<20, kMasking>(m, head, length_q, length_k, row, 32, 8);
    check_keys<1, kMasking>(m, head, length_q, length_k, row, 1, 1);
  }
  for (int key = 0; key < length_k; key += 16) {
    check_queries<16, 32, kMasking>(m, head, length_q, length_k, key);
    check_queries<16, 8, kMasking>(m, head, length_q, length_k, key);
  }
  // The bounds that within() cut mean what they meant.
  for (int i = 0; i < length_q; ++i) {
    for (int j = 0; j < length_k; ++j) {
      if (sees(mask, head, i + length_k - length_q, j) != sees(m, head, i + length_k - length_q, j)) throw Fault{"within()", i, j};
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 1000;
  generator.seed(argc > 2 ? atoi(argv[2]) : 0);
  for (int n = 0; n < cases; ++n) {
    const bool band = chance(0.3);
    const Mask m = random_mask(band);
    const int length_q = between(1, chance(0.3) ? 8 : 150), length_k = chance(0.4) ? length_q : between(0, chance(0.2) ? 8 : 250), head = between(0, 3);
    try {
      if (band) check<Masking::kBand>(m, head, length_q, length_k);
      check<Masking::kGeneral>(m, head, length_q, length_k);
    } catch (const Fault& fault) {
      printf("case %d: %s (%d, %d)\n%d queries, %d keys, head %d, mask [%d, %d, %d, %d, %d, %d, %d, %d]\n", n, fault.what, fault.a, fault.b, length_q,
             length_k, head, m.lower, m.upper, m.chunk, m.chunk_lower, m.chunk_upper, m.shift, m.shifted_from, m.sinks);
      return 1;
    }
  }
  printf("%d cases right\n", cases);
  return 0;
}
