// What a thread writes down while it works on an item: queries as the product wants them, sums,
// scores, and where each query row stands.
//
// Scores lie as they come out of the products: a vector holds kBlockRows rows of queries for as
// many tokens as fill it, lane = row * tokens + token. Everything that is kept for each query row
// fills its lanes in the same way.
#pragma once

#include "kernel/functions.hpp"
#include "kernel/product.hpp"
#include "kernel/work.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

template <int kBlockRows>
struct Block {
  static constexpr int kTokens = kLanes / kBlockRows;  // of one vector of scores
  static constexpr int kVectors = kTile / kTokens;     // of a tile

  // A vector that gives each row's lanes the number of that row.
  template <class Vector, class OfRow>
  KVSPAN_INLINE Vector by_row(OfRow of_row) {
    Vector v{};
    for (int i = 0; i < kLanes; ++i) v[i] = of_row(i / kTokens);
    return v;
  }
};

// The sums over the tokens so far, of one item.
struct Part {
  Floats* sums;     // [heads][blocks][chunks][rows] pairs
  Floats* largest;  // [heads][blocks] scores, the same in all lanes of a row
  Floats* weight;   // [heads][blocks], each lane for its tokens

  [[gnu::always_inline]] Part(const Layout& layout, float* at) {
    const std::ptrdiff_t blocks = std::ptrdiff_t{layout.max_heads} * layout.n_blocks;
    sums = reinterpret_cast<Floats*>(at);
    largest = sums + blocks * layout.sums_size() / kLanes;
    weight = largest + blocks;
  }
};

struct Scratch {
  Part part;
  Floats* queries;                // [heads][blocks][chunks][rows], of the product's chunks
  Floats* scores;                 // [heads][blocks][vectors]; in their place, later, the weights
  Floats* slopes;                 // [heads][blocks]
  Ints *position, *first, *last;  // [blocks]: a row's own position; it sees [first, last)
  // All rows see the tokens from here up to there.
  std::int64_t all_from, all_up_to;

  [[gnu::always_inline]] explicit Scratch(const Piece& piece)
      : part(*piece.layout, piece.own), all_from(0), all_up_to(0) {
    const Layout& layout = *piece.layout;
    const std::ptrdiff_t blocks = std::ptrdiff_t{layout.max_heads} * layout.n_blocks;
    queries = reinterpret_cast<Floats*>(piece.scratch);
    scores = queries + blocks * layout.sums_size() / kLanes;
    slopes = scores + blocks * layout.block_rows * kTile / kLanes;
    position = reinterpret_cast<Ints*>(slopes + blocks);
    first = position + layout.n_blocks;
    last = first + layout.n_blocks;
  }
};

}  // namespace kvspan::flash::KVSPAN_LEVEL
