// Ids of one word of the pool's bitmap, and the choice among them: in as few runs of adjacent ids
// as there can be, since adjacent frames under adjacent pages take one call to map.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace kvspan {

inline constexpr std::uint32_t kIdsPerWord = 32;

// Some of the ids word * 32 to word * 32 + 31, bit i standing for the i-th. An empty mask is
// "none".
struct IdBits {
  std::uint32_t word = 0;
  std::uint32_t mask = 0;
};

struct Run {
  std::uint32_t start = 0, length = 0;

  constexpr std::uint32_t mask() const {
    return length == kIdsPerWord ? ~std::uint32_t{0} : ((std::uint32_t{1} << length) - 1) << start;
  }
};

// The longest run of ones, but at most `want` of it. Bit i of `starts` says that a run of `length`
// begins at i; shifting and doubling finds the length in O(log want), halving then settles it.
// Precondition: ids != 0, 0 < want.
constexpr Run longest_run(std::uint32_t ids, std::uint32_t want) {
  want = std::min(want, kIdsPerWord);
  std::uint32_t starts = ids;
  std::uint32_t length = 1, step = 1;
  while (length < want) {
    step = std::min(length, want - length);
    const std::uint32_t longer = starts & (starts >> step);
    if (longer == 0) break;
    starts = longer;
    length += step;
  }
  if (length < want) {
    for (step = std::bit_floor(step); step != 0; step /= 2) {
      const std::uint32_t longer = starts & (starts >> step);
      if (longer == 0 || length + step > want) continue;
      starts = longer;
      length += step;
    }
  }
  return {static_cast<std::uint32_t>(std::countr_zero(starts)), length};
}

static_assert(longest_run(0b0111'0110, 3).mask() == 0b0111'0000);
static_assert(longest_run(0b1111'1110'0110, 6).mask() == 0b0111'1110'0000);
static_assert(longest_run(~std::uint32_t{0}, 1000).length == kIdsPerWord);

// `want` of the ids (all if there are no more), the longest runs first.
constexpr std::uint32_t pick(std::uint32_t ids, std::uint32_t want) {
  if (static_cast<std::uint32_t>(std::popcount(ids)) <= want) return ids;
  std::uint32_t picked = 0;
  while (want != 0) {
    const Run run = longest_run(ids, want);
    picked |= run.mask();
    ids &= ~run.mask();
    want -= run.length;
  }
  return picked;
}

static_assert(pick(0b1011'0111'0001, 5) == 0b0011'0111'0000);
static_assert(pick(0b1011'0111'0001, 64) == 0b1011'0111'0001);

// Calls visit(run) for each run of adjacent ids, from the lowest up.
template <class Visit>
constexpr void for_each_run(std::uint32_t ids, const Visit& visit) {
  while (ids != 0) {
    const auto start = static_cast<std::uint32_t>(std::countr_zero(ids));
    const Run run{start, static_cast<std::uint32_t>(std::countr_one(ids >> start))};
    visit(run);
    ids &= ~run.mask();
  }
}

}  // namespace kvspan
