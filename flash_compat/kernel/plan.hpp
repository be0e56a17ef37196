// Who computes what. The tiles of all items stand in one line, and each thread takes an equal piece
// of it: so ragged lengths and a batch of one keep all threads busy, and at most two items of a
// piece are cut, whose parts are joined afterwards. The plan follows from shapes, lengths and the
// number of threads alone, and so do the bits of the result.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel/work.hpp"

namespace kvspan::flash {

struct Plan {
  Layout layout;
  std::vector<Item> items;
  std::vector<std::int64_t> cuts;  // piece i has the tiles cuts[i] to cuts[i + 1]
  std::vector<int> unfinished;     // items that no piece finishes: cut ones, and those of no token

  int n_pieces() const { return static_cast<int>(cuts.size()) - 1; }
  int piece_of(std::int64_t tile) const;
  int item_of(std::int64_t tile) const;
};

// Throws std::invalid_argument for lengths, slots and blocks that are not there.
Plan make_plan(const Problem& problem, int lanes, int n_threads);

}  // namespace kvspan::flash
