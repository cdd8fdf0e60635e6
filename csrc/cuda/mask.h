// Which keys a query sees, as eight integers, and the tiles of keys or queries that follow: what every kernel, and both sides of
// each, ask here, so that what is loaded, computed and masked cannot disagree. Plain C++: host, device and tests compile it.
#pragma once

#include <cstdint>

namespace seal {

// Query i of a sequence stands at position p = i + length_k - length_q. It sees key j where
//   lower <= j - p <= upper   and, unless chunk is 0,   chunk_lower <= chunk_of(j) - chunk_of(p) <= chunk_upper,
// with chunk_of(x) = floor((x + shift) / chunk), the shift 0 for query heads below shifted_from; and where j < sinks and j <= p.
struct Mask {
  static constexpr int32_t kUnbounded = 1 << 30;

  int32_t lower = -kUnbounded, upper = kUnbounded;
  int32_t chunk = 0;
  int32_t chunk_lower = -kUnbounded, chunk_upper = kUnbounded;
  int32_t shift = 0, shifted_from = kUnbounded;  // a multiple of the query heads of a key/value head, or no smaller than all
  int32_t sinks = 0;

  constexpr bool is_band() const { return chunk == 0 && sinks == 0; }
  // The same mask for sequences of at most so many rows, with a band so narrow that a position plus a bound is an int32.
  constexpr Mask within(int64_t rows_q, int64_t rows_k) const {
    const auto clamped = [=](int32_t bound) { return static_cast<int32_t>(bound < -rows_k ? -rows_k : bound > rows_q ? rows_q : bound); };
    Mask mask = *this;
    mask.lower = clamped(lower);
    mask.upper = clamped(upper);
    return mask;
  }
};

// What a kernel is compiled for: kBand knows that there are neither chunks nor sinks.
enum class Masking { kBand, kGeneral };

struct Span {
  int begin, end;  // [begin, end)
  constexpr bool any() const { return end > begin; }
};

// A mask as one query head has it.
template <Masking kMasking>
class HeadMask {
  static constexpr bool kGeneral = kMasking == Masking::kGeneral;

 public:
  constexpr HeadMask(const Mask& mask, int head) : mask_(mask), shift_(kGeneral && head >= mask.shifted_from ? mask.shift : 0) {}

  // The keys of a sequence of `length` that band and chunks let the query at `position` see, and perhaps places before the first
  // key. Both ends grow with the position.
  constexpr Span keys(int position, int length) const {
    Span keys = {position + mask_.lower, position + mask_.upper + 1};
    if constexpr (kGeneral) {
      if (mask_.chunk > 0) {
        const int chunk = chunk_of(position);
        keys = intersection(keys, chunk_begin(int64_t{chunk} + mask_.chunk_lower), chunk_begin(int64_t{chunk} + mask_.chunk_upper + 1));
      }
    }
    return {keys.begin, keys.end > length ? length : keys.end};
  }
  // It sees the keys before this one as well.
  constexpr int sink_end(int position, int length) const {
    if constexpr (!kGeneral) return 0;
    int end = position + 1 < mask_.sinks ? position + 1 : mask_.sinks;
    end = end < length ? end : length;
    return end > 0 ? end : 0;
  }

  // The positions from which band and chunks show a key: both ends grow with the key.
  constexpr Span positions(int key) const {
    Span positions = {key - mask_.upper, key - mask_.lower + 1};
    if constexpr (kGeneral) {
      if (mask_.chunk > 0) {
        const int chunk = chunk_of(key);
        positions = intersection(positions, chunk_begin(int64_t{chunk} - mask_.chunk_upper), chunk_begin(int64_t{chunk} - mask_.chunk_lower + 1));
      }
    }
    return positions;
  }
  // It is seen from its own position on as well.
  constexpr bool is_sink(int key) const { return kGeneral && key < mask_.sinks; }

 private:
  constexpr int chunk_of(int x) const {
    const int shifted = x + shift_, sign = shifted >> 31;
    return static_cast<int>(static_cast<uint32_t>(shifted ^ sign) / static_cast<uint32_t>(mask_.chunk)) ^ sign;
  }
  constexpr int64_t chunk_begin(int64_t chunk) const { return chunk * mask_.chunk - shift_; }
  // Within the span's ends, which are int32, so is what it is cut to: an end beyond the other is brought back to it.
  static constexpr Span intersection(Span span, int64_t begin, int64_t end) {
    return {begin <= span.begin ? span.begin : begin < span.end ? static_cast<int>(begin) : span.end,
            end >= span.end ? span.end : end > span.begin ? static_cast<int>(end) : span.begin};
  }

  const Mask& mask_;
  int shift_;
};

// The tiles of kKeys keys that the queries at positions [first, last] see. Tiles of sinks that lie apart from the others, before
// them, are numbered right before them: the numbers [begin, end) have no gap, and loops go through them.
template <int kKeys, Masking kMasking>
struct KeyTiles {
  int begin, end;
  int band_begin;  // from here on a tile's number is its place; those before lie at 0, 1, ...

  // The tiles that a part of the queries sees, by the numbers of all.
  struct Part {
    int begin, end;              // those with a key that some query sees, perhaps with others between them
    int whole_begin, whole_end;  // those of which every query sees every key
    int keys_end;                // of tile end - 1 no query sees a key from here on
    constexpr bool any() const { return end > begin; }
    constexpr bool whole(int number) const { return number >= whole_begin && number < whole_end; }
  };

  constexpr void find(const HeadMask<kMasking>& mask, int first, int last, int length) {
    const Span band = {not_negative(mask.keys(first, length).begin), mask.keys(last, length).end};
    begin = band.begin / kKeys;
    end = band.any() ? (band.end + kKeys - 1) / kKeys : begin;
    band_begin = begin;
    if constexpr (kMasking == Masking::kGeneral) {
      const int sinks = (mask.sink_end(last, length) + kKeys - 1) / kKeys;
      if (sinks == 0) return;
      if (end == begin || sinks >= begin) {
        if (end == begin || end < sinks) end = sinks;
        begin = band_begin = 0;
      } else {
        begin -= sinks;
      }
    }
  }

  constexpr int place(int number) const { return kMasking == Masking::kBand || number >= band_begin ? number : number - begin; }

  // For the queries at positions [first, last], some of those of find(), or none: last < first.
  constexpr Part part(const HeadMask<kMasking>& mask, int first, int last, int length) const {
    const Span of_first = mask.keys(first, length), of_last = mask.keys(last, length);
    const Span some = {not_negative(of_first.begin), of_last.end};
    const bool band = last >= first && some.any();
    Part part = {begin, begin, (not_negative(of_last.begin) + kKeys - 1) / kKeys, not_negative(of_first.end) / kKeys, 0};
    if (band) part = {some.begin / kKeys, (some.end + kKeys - 1) / kKeys, part.whole_begin, part.whole_end, some.end};
    if constexpr (kMasking == Masking::kGeneral) {
      const int sinks = last >= first ? mask.sink_end(last, length) : 0, sinks_of_first = mask.sink_end(first, length);
      if (sinks > 0) {
        const int sink_tiles_end = begin + (sinks + kKeys - 1) / kKeys;
        part.begin = begin;
        if (!band || part.end < sink_tiles_end) part.end = sink_tiles_end;
        if (!band || part.keys_end < sinks) part.keys_end = sinks;
      }
      // A tile that is whole by the sinks' help starts at the first key, where all tiles are numbered by their places.
      if (sinks_of_first > 0 && sinks_of_first >= of_last.begin) {
        part.whole_begin = 0;
        if (of_first.end < sinks_of_first) part.whole_end = sinks_of_first / kKeys;
      }
    }
    return part;
  }

 private:
  static constexpr int not_negative(int key) { return key < 0 ? 0 : key; }
};

// The tiles of kQueries queries that see some of the keys [first, last], at least one.
template <int kQueries, Masking kMasking>
struct QueryTiles {
  int begin, end;              // others that see none of them may lie between
  int whole_begin, whole_end;  // those of which every query sees every key; past the sequence's end any query may count as one

  constexpr void find(const HeadMask<kMasking>& mask, int first, int last, int length_q, int length_k) {
    const Span of_first = mask.positions(first), of_last = mask.positions(last);
    Span some = {of_first.begin, of_last.end}, all = {of_last.begin, of_first.end};
    if constexpr (kMasking == Masking::kGeneral) {
      if (mask.is_sink(first)) {
        if (!some.any() || first < some.begin) some.begin = first;
        some.end = length_k;
      }
      if (mask.is_sink(last)) {
        if (!all.any() || all.end < last || last < all.begin) all.begin = last;
        all.end = length_k;
      }
    }
    // From positions to queries.
    const int offset = length_q - length_k;
    some = {within(some.begin + offset, length_q), within(some.end + offset, length_q)};
    begin = some.begin / kQueries;
    end = some.any() ? (some.end + kQueries - 1) / kQueries : begin;
    whole_begin = (within(all.begin + offset, length_q) + kQueries - 1) / kQueries;
    const int all_end = within(all.end + offset, length_q);
    whole_end = all_end == length_q ? end : all_end / kQueries;
  }

 private:
  static constexpr int within(int query, int length) { return query < 0 ? 0 : query > length ? length : query; }
};

}  // namespace seal
