// Claims on several sequences for as long as a block lasts: all, or an error and none.
#pragma once

#include <cstddef>
#include <span>

#include "cache/sequence_state.hpp"

namespace kvspan {

class Claims {
 public:
  explicit Claims(std::span<SequenceState* const> states) : states_(states) {
    try {
      for (; claimed_ < states_.size(); ++claimed_) states_[claimed_]->claim_or_throw();
    } catch (...) {
      release();
      throw;
    }
  }
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;
  ~Claims() { release(); }

 private:
  void release() noexcept {
    for (std::size_t i = 0; i < claimed_; ++i) {
      SequenceState& state = *states_[i];
      // A row that was dropped meanwhile has its last word already.
      if (state.claim.load(std::memory_order_relaxed) != Claim::used) continue;
      state.unclaim(state.is_lost ? Claim::lost : Claim::idle);
    }
  }

  const std::span<SequenceState* const> states_;
  std::size_t claimed_ = 0;
};

}  // namespace kvspan
