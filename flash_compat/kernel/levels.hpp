// Which levels there are in this build and on this processor.
#pragma once

#include <vector>

#include "kernel/level.hpp"

namespace kvspan::flash {

// Those that this processor runs, the best first.
const std::vector<const Level*>& levels();

// The best, of those whose vectors are no wider than head_dim allows; null when there is none.
const Level* level_for(int head_dim);

}  // namespace kvspan::flash
