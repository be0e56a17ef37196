// A handle of one sequence: what the API calls a sequence. It claims the sequence's state for the
// length of a call and has the cache do the work (growth.cpp). Dropping the handle releases the
// sequence, on the stream that worked on it last.
#pragma once

#include <memory>

#include "cache/cache.hpp"

namespace kvspan {

class Sequence {
 public:
  Sequence(std::shared_ptr<Cache> cache, std::shared_ptr<SequenceState> state)
      : cache_(std::move(cache)), state_(std::move(state)) {}
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence();

  // n more tokens become writable: [length, length + n). All or nothing.
  void extend(Tokens n, Stream stream);
  // Forgets the tokens from position n on. Their pages stay mapped while they are likely to be
  // used.
  void truncate(Tokens n, Stream stream);
  // Gives up the pages that lie whole before `position` in layers with a sliding window.
  void drop_before(Tokens position, Stream stream);
  // A second sequence with the same tokens: whole frames shared, the rest copied.
  std::shared_ptr<Sequence> fork(Stream stream);
  // Frees the slot. Does nothing the second time.
  void release(Stream stream);

  Tokens length() const { return state_->tokens(); }
  Tokens dropped() const { return Tokens(state_->dropped.load(std::memory_order_relaxed)); }
  bool is_released() const noexcept { return state_->is_released(); }
  SlotId slot() const;

  const std::shared_ptr<Cache>& cache() const { return cache_; }
  const std::shared_ptr<SequenceState>& state() const { return state_; }

 private:
  const std::shared_ptr<Cache> cache_;
  const std::shared_ptr<SequenceState> state_;
};

}  // namespace kvspan
