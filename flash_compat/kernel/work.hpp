// What the vectorised code is given: a piece of the work that plan.hpp divides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel/problem.hpp"

namespace kvspan::flash {

constexpr int kTile = 32;  // tokens; while a tile is computed, the next comes into the cache

// One row of the batch with some of its KV heads: what reads the same tokens together.
struct Item {
  int row;
  int head_begin, n_heads;
  std::int64_t begin, end;  // the tokens that some query sees
  std::int64_t first_tile;  // the tiles of all items stand in one line

  [[gnu::always_inline]] std::int64_t n_tiles() const { return (end - begin + kTile - 1) / kTile; }
  [[gnu::always_inline]] std::int64_t last_tile() const { return first_tile + n_tiles(); }
};

// How queries and sums lie in memory, for vectors of so many lanes. The query rows of a KV head are
// taken in blocks, the last one padded; head_dim in chunks of two vectors, of which the last
// overlaps the one before when head_dim is no multiple of a chunk.
struct Layout {
  int lanes;
  int block_rows, n_blocks;
  int n_chunks;
  int max_heads;  // of an item

  // Floats of one block of one head.
  [[gnu::always_inline]] std::ptrdiff_t sums_size() const {
    return std::ptrdiff_t{n_chunks} * block_rows * 2 * lanes;
  }
  // Floats of an item's part: the sums of all blocks, then for each block two vectors, the largest
  // score and the sum of the weights.
  [[gnu::always_inline]] std::ptrdiff_t part_size() const {
    return std::ptrdiff_t{max_heads} * n_blocks * (sums_size() + 2 * lanes);
  }
  // Floats of everything else that a thread writes down (scratch.hpp).
  [[gnu::always_inline]] std::ptrdiff_t scratch_size() const {
    const std::ptrdiff_t blocks = std::ptrdiff_t{max_heads} * n_blocks;
    return blocks * (sums_size() + block_rows * kTile + lanes) + 3 * n_blocks * lanes;
  }
};

// The tiles [begin, end) of the line. The item that began before this piece leaves its part in
// `leading`, the one that goes on after it leaves it in `own`.
struct Piece {
  const Problem* problem;
  const Layout* layout;
  const Item* items;  // of the whole line
  int first_item;     // that holds `begin`
  std::int64_t begin, end;
  float *leading, *own;
  float* scratch;
};

// One KV head's parts of an item, in the order of the tokens: the first, then those that stand
// `stride` floats from each other.
struct Join {
  const Problem* problem;
  const Layout* layout;
  const Item* item;
  int head;  // of the item's
  int n_parts;
  const float *first, *others;
  std::ptrdiff_t stride;
};

}  // namespace kvspan::flash
