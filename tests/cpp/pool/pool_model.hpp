// What the pool means: a plain state, and the steps by which each operation changes it.
//
// Most are one step. Two things take several, since the pool's word is about numbers first and
// about frames then. A take is admitted to so many, which is all that a refusal of another one
// depends on, and picks them afterwards: it may get one that was given in between. A give takes the
// references away one by one, and those without one left may be picked already while takers are
// not yet admitted to them. All steps of an operation are between its beginning and its end.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pool/history.hpp"

namespace kvspan_test {

// How far an operation is.
struct Progress {
  std::size_t n_steps = 0;
  std::size_t n_recycled = 0;   // of a take: frames to pick
  std::uint32_t n_freed = 0;    // of a give
  std::uint32_t n_refused = 0;  // of a give or share

  auto operator<=>(const Progress&) const = default;
};

class PoolModel {
 public:
  // Frames of which the first `n_in_use` were taken, and no others. Of a pool that lends none to
  // its threads one can tell which frames a take is admitted to: recycled ones first.
  PoolModel(std::uint32_t n_frames, std::uint32_t n_in_use, bool lends);

  static bool is_done(const Operation& operation, const Progress& progress);

  // In how many ways the next step may go; all but one may be impossible.
  static std::size_t n_ways(const Operation& operation, const Progress& progress);

  // Takes that step. False, the state being of no use any more, when the operation would have had
  // another result.
  bool step(const Operation& operation, Progress& progress, std::size_t way);

  std::uint32_t references(std::size_t index) const { return references_[index]; }
  FramePool::Counts counts() const;

  auto operator<=>(const PoolModel&) const = default;

 private:
  std::uint32_t bump() const { return static_cast<std::uint32_t>(references_.size()) - n_fresh_; }
  bool refuses(const Operation& operation) const;
  bool admit(const Operation& operation, std::size_t n_recycled);
  bool pick(std::span<const FrameId> frames);

  std::vector<std::uint32_t> references_;  // of each frame
  std::uint32_t n_fresh_;                  // never taken: the last ones
  std::uint32_t n_free_ = 0;               // recycled ones that takers can still be admitted to
  bool lends_;
};

}  // namespace kvspan_test
