// Attention of few queries over many keys, as in decoding: the keys and values of every token are
// read once, at the speed of memory.
//
// What stands where: problem.hpp is the question, plan.cpp divides it (over key ranges, too, as
// flash-decoding does), threads.cpp runs it. attend.cpp and the headers that it includes are the
// vectorised kernel, for every level of levels.cpp: a tile's scores (scores.hpp), their weights
// (softmax.hpp), the weighted sums of values (sums.hpp), and the end of an item (finish.hpp).
#pragma once

#include "kernel/level.hpp"
#include "kernel/problem.hpp"

namespace kvspan::flash {

// Throws std::invalid_argument for lengths, slots or blocks that are not there, before it writes.
// The same bits for the same problem, level and n_threads.
void decode(const Problem& problem, const Level& level, int n_threads);

}  // namespace kvspan::flash
