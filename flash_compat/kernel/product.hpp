// How stored keys and values are multiplied: by widening them to floats, or, for bfloat16 where the
// processor can, two at a time without (vdpbf16ps, which adds to each float lane the products of
// two neighbours).
//
// A product has its own order of the numbers in a chunk of sums; in_order() undoes it. Weights are
// written in words of 32 bits, each for kTokens tokens.
#pragma once

#include "kernel/elements.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

template <class Stored>
struct Widened {
  static constexpr int kBytes = Stored::kBytes;
  static constexpr int kTokens = 1;
  using Chunk = Pair;
  using Weight = Floats;

  KVSPAN_INLINE Pair query(Pair x) { return Stored::from_order(x); }
  KVSPAN_INLINE Pair in_order(Pair x) { return Stored::in_order(x); }

  KVSPAN_INLINE Pair key(const char* at) { return Stored::load_chunk(at); }
  KVSPAN_INLINE Floats add_scores(Floats sum, Pair query, Pair key) {
    return query.b * key.b + (query.a * key.a + sum);
  }

  KVSPAN_INLINE void store_weights(std::uint32_t* at, Floats weights) { store(at, weights); }
  KVSPAN_INLINE Floats weight(const std::uint32_t* at) {
    float x;
    __builtin_memcpy(&x, at, sizeof x);
    return splat(x);
  }
  // Of the token whose row is *row.
  KVSPAN_INLINE Pair values(const char* const* row, std::ptrdiff_t offset) {
    return Stored::load_chunk(*row + offset);
  }
  KVSPAN_INLINE Pair add_values(Pair sum, Floats weight, Pair value) {
    return {weight * value.a + sum.a, weight * value.b + sum.b};
  }
};

#if defined(__AVX512BF16__)
struct Dotted {
  static constexpr int kBytes = 2;
  static constexpr int kTokens = 2;
  using Chunk = Ints;
  using Weight = Ints;
  using Shorts = std::uint16_t __attribute__((vector_size(64)));

  KVSPAN_INLINE Floats dot(Floats sum, Ints x, Ints y) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
  KVSPAN_INLINE Ints query(Pair x) { return (Ints)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a); }
  KVSPAN_INLINE Ints key(const char* at) { return load<Ints>(at); }
  KVSPAN_INLINE Floats add_scores(Floats sum, Ints query, Ints key) { return dot(sum, query, key); }

  KVSPAN_INLINE void store_weights(std::uint32_t* at, Floats weights) {
    store(at, (Halves)_mm512_cvtneps_pbh((__m512)weights));
  }
  KVSPAN_INLINE Ints weight(const std::uint32_t* at) {
    std::int32_t two;
    __builtin_memcpy(&two, at, sizeof two);
    return splat(two);
  }
  // Of two tokens, number by number side by side, as vpunpck[lh]wd does it: four of each of the
  // 128-bit parts of a row in a, the other four in b.
  KVSPAN_INLINE Pair values(const char* const* row, std::ptrdiff_t offset) {
    constexpr auto low = [](int i) { return (i & ~7) + (i & 7) / 2 + (i & 1) * 32; };
    constexpr auto high = [](int i) { return (i & ~7) + (i & 7) / 2 + (i & 1) * 32 + 4; };
    const Shorts x = load<Shorts>(row[0] + offset), y = load<Shorts>(row[1] + offset);
    return {(Floats)pick<low>(x, y), (Floats)pick<high>(x, y)};
  }
  KVSPAN_INLINE Pair add_values(Pair sum, Ints weight, Pair values) {
    return {dot(sum.a, weight, (Ints)values.a), dot(sum.b, weight, (Ints)values.b)};
  }
  KVSPAN_INLINE Pair in_order(Pair x) {
    constexpr auto first = [](int i) { return i / 8 * 4 + i % 4 + (i & 4) / 4 * kLanes; };
    constexpr auto second = [](int i) {
      return i / 8 * 4 + i % 4 + (i & 4) / 4 * kLanes + kLanes / 2;
    };
    return {pick<first>(x.a, x.b), pick<second>(x.a, x.b)};
  }
};
#endif

template <class Stored>
struct ProductOf {
  using Type = Widened<Stored>;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<BFloat16> {
  using Type = Dotted;
};
#endif

}  // namespace kvspan::flash::KVSPAN_LEVEL
