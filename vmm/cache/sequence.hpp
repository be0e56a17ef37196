// A handle of one sequence: what the API calls a sequence. It claims the sequence's state for the
// length of a call and has the cache do the work (growth.cpp). Dropping the handle releases the
// sequence, on the stream that worked on it last.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

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
  // n more sequences that begin with the first `length` tokens (none: all of them): whole frames
  // shared, the rest copied. All or nothing.
  std::vector<std::shared_ptr<Sequence>> fork(std::int32_t n, std::optional<Tokens> length,
                                              Stream stream);
  // Lets the prefix index know the pages that the first tokens fill. Returns how many tokens of
  // this chain it knows now. With `merges`, pages that it knew already take the place of this
  // sequence's, once the stream's work is done.
  Tokens publish(std::span<const std::int32_t> tokens, bool merges, Stream stream);
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
