// How a sequence grows, as the mapper sees it, which looks at the length now and then: by how many
// tokens a step, and how long a step takes. From that follows for how many tokens there should be
// room by now.
#pragma once

#include <algorithm>
#include <chrono>
#include <optional>

#include "core/ids.hpp"

namespace kvspan {

class Pace {
 public:
  using Clock = std::chrono::steady_clock;

  // More in one step is a piece of a prompt; less is decoding, speculation included.
  static constexpr Tokens kMostDecoded{16};
  // For decoding of which nothing is known yet, or that is too fast to wait for: half a page of
  // Llama-3-8B's.
  static constexpr Tokens kAnyPace{8};
  // The first piece of a prompt that was announced: what engines prefill in one step (2,048 is
  // vLLM's max_num_batched_tokens).
  static constexpr Tokens kFirstPiece{2048};

  // How long a prompt's token takes, as the last pieces of any sequence tell: what is shared by all
  // that are looked at.
  struct Prefill {
    Clock::duration per_token{};
  };

  // The length is so much now, of `expected` that were announced (0: nothing was). Returns for how
  // many more tokens there should be room, if it takes until `lead` from now to make it.
  Tokens look(Tokens length, Tokens expected, Clock::time_point now, Clock::duration lead,
              Prefill& prefill) {
    if (!at_ || length != length_) {
      note(length, now);
      if (period_ > kUnknown && is_prompt(step_)) prefill.per_token = period_ / last_.value;
    }
    if (length < expected && step_ == Tokens(0)) return piece(kFirstPiece, expected - length);
    if (length < expected && is_prompt(step_)) {
      // The next piece comes when this one is done.
      const auto period = period_ > kUnknown ? period_ : prefill.per_token * last_.value;
      const bool is_due = now + lead >= *at_ + period * 14 / 15;
      return is_due ? piece(step_, expected - length) : Tokens(0);
    }
    if (length == Tokens(0)) return Tokens(0);  // a prompt will come, and nobody knows how long
    if (period_ == kUnknown || is_prompt(step_)) return kAnyPace;
    // Steps that may be done by then, should they take a quarter less than the last one.
    const auto n_steps = (now + lead - *at_) / (period_ * 3 / 4 + Clock::duration(1));
    return std::min(step_ * std::min(n_steps, kAnyPace.value), std::max(step_, kAnyPace));
  }

 private:
  static constexpr Clock::duration kUnknown{};

  // Of a prompt that has so many tokens left. Behind its last piece come the first tokens at once.
  static Tokens piece(Tokens most, Tokens left) { return left > most ? most : left + kAnyPace; }

  static bool is_prompt(Tokens step) { return step > kMostDecoded; }

  void note(Tokens length, Clock::time_point now) {
    const Tokens step = at_ ? length - length_ : Tokens(0);
    const bool goes_on =
        step > Tokens(0) && last_ > Tokens(0) && is_prompt(step) == is_prompt(last_);
    const Clock::duration period = goes_on ? now - *at_ : kUnknown;
    // Engines work in ticks, which a prompt's pieces are not in step with.
    const bool is_averaged = goes_on && period_ > kUnknown && is_prompt(step);
    period_ = is_averaged ? (3 * period_ + period) / 4 : period;
    // Steps of speculation differ: the longer of the last two.
    step_ = goes_on ? std::max(step, last_) : step;
    last_ = step;
    length_ = length;
    at_ = now;
  }

  std::optional<Clock::time_point> at_;  // of the last step
  Clock::duration period_ = kUnknown;    // from the one before, if that was of the same kind
  Tokens length_{}, step_{}, last_{};
};

}  // namespace kvspan
