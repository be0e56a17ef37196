#include "replay/engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>

namespace kvspan::bench {

namespace {

// Of the memory, left for the decoding of those that are admitted (vLLM's watermark).
constexpr double kReserve = 0.01;

class Engine {
 public:
  Engine(Memory& memory, std::span<const Request> requests, bool saturated)
      : memory_(memory), requests_(requests), saturated_(saturated), states_(requests.size()) {
    capacity_ = memory_.available_bytes();
    for (std::size_t i = 0; i < requests.size(); ++i) {
      states_[i].to_prefill = requests[i].prompt;
      states_[i].to_decode = requests[i].output;
    }
  }

  ReplayResult run() {
    std::size_t n_arrived = 0;
    std::size_t second = 0;
    DriverWork calls_before{}, background_before{};
    while (n_done_ < requests_.size() && !memory_.is_over()) {
      const double now = static_cast<double>(result_.n_ticks) * kTick;
      while (n_arrived < requests_.size() &&
             (saturated_ || requests_[n_arrived].arrival_s <= now)) {
        queue_.push_back(n_arrived++);
      }
      admit(now);
      let_pass(now, now + kSchedule);
      prefill(now);
      decode();
      let_pass(now + kSchedule, now + kTick);
      ++result_.n_ticks;
      if (static_cast<std::size_t>(now) != second) {
        second = static_cast<std::size_t>(now);
        const Held held = memory_.held();
        if (is_counted() && held.mapped > 0) {
          result_.waste_over_time.push_back(100 * (held.mapped - held.used) / held.mapped);
        }
        const DriverWork calls = result_.in_calls - calls_before;
        const DriverWork background = result_.in_background - background_before;
        const double pages = calls.pages_mapped + background.pages_mapped;
        if (pages > result_.worst_pages && is_counted()) {
          result_.worst_pages = pages;
          result_.worst_seconds_in_calls = calls.seconds;
          result_.worst_seconds = calls.seconds + background.seconds;
        }
        calls_before = result_.in_calls;
        background_before = result_.in_background;
      }
    }
    result_.n_requests = n_done_;
    return std::move(result_);
  }

 private:
  struct State {
    std::int64_t to_prefill = 0, to_decode = 0, length = 0;
    double next_piece_s = 0;  // when it can be prefilled
  };

  // Runs a call of the engine's; its driver calls are the engine's wait.
  template <class F>
  bool call(F f, std::vector<double>* stalls) {
    const DriverWork before = memory_.work();
    const double begin = memory_.clock();
    const bool ok = f();
    const double seconds = memory_.clock() - begin;
    result_.in_calls += memory_.work() - before;
    if (stalls != nullptr && is_counted()) stalls->push_back(seconds);
    return ok;
  }

  bool is_counted() const {
    return !saturated_ ||
           (!queue_.empty() && static_cast<double>(result_.n_ticks) * kTick >= kWarmUp);
  }

  void admit(double now) {
    while (!queue_.empty()) {
      const std::size_t id = queue_.front();
      double promised = 0;
      for (const std::size_t other : prefilling_) {
        promised += static_cast<double>(states_[other].to_prefill);
      }
      const double needed =
          (promised + static_cast<double>(states_[id].to_prefill)) * memory_.bytes_per_token();
      const bool is_alone = prefilling_.empty() && decoding_.empty();
      if (needed + kReserve * capacity_ > memory_.available_bytes() && !is_alone) return;
      queue_.pop_front();
      if (saturated_ && result_.n_ticks == 0) age(id);
      call(
          [&] {
            memory_.begin(id, states_[id].to_prefill);
            return true;
          },
          nullptr);
      states_[id].next_piece_s = now;
      prefilling_.push_back(id);
    }
  }

  // Some of its tokens are made already: those that all begin at once are not all of one age.
  void age(std::size_t id) {
    const double golden = static_cast<double>(id) * 0.618033988749895;
    State& s = states_[id];
    const auto n =
        static_cast<std::int64_t>((golden - std::floor(golden)) * static_cast<double>(s.to_decode));
    s.to_prefill += n;
    s.to_decode -= n;
  }

  void prefill(double now) {
    for (std::size_t i = 0; i < prefilling_.size();) {
      const std::size_t id = prefilling_[i];
      State& s = states_[id];
      bool is_preempted = false;
      while (s.next_piece_s <= now + 1e-9 && s.to_prefill > 0) {
        const std::int64_t n = std::min(s.to_prefill, kPiece);
        if (!call([&] { return memory_.extend(id, n); }, &result_.piece_stalls)) {
          is_preempted = !preempt_for(id);
          if (is_preempted) break;
          i = static_cast<std::size_t>(std::ranges::find(prefilling_, id) - prefilling_.begin());
          continue;
        }
        s.to_prefill -= n;
        s.length += n;
        s.next_piece_s += static_cast<double>(n) / kPrefillTokensPerSecond;
      }
      if (is_preempted) continue;  // it left the list
      if (s.to_prefill == 0 && s.next_piece_s <= now + 1e-9) {
        prefilling_.erase(prefilling_.begin() + static_cast<std::ptrdiff_t>(i));
        decoding_.push_back(id);
      } else {
        ++i;
      }
    }
  }

  void decode() {
    while (!decoding_.empty()) {
      const bool ok = call([&] { return memory_.step(decoding_); }, &result_.step_stalls);
      if (ok) break;
      preempt(youngest());
    }
    if (decoding_.empty()) return;
    ++result_.n_steps;
    for (std::size_t i = 0; i < decoding_.size();) {
      const std::size_t id = decoding_[i];
      ++states_[id].length;
      if (--states_[id].to_decode > 0) {
        ++i;
        continue;
      }
      release(id);
      ++n_done_;
      decoding_.erase(decoding_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  std::size_t youngest() const {
    if (!prefilling_.empty()) return prefilling_.back();
    return decoding_.back();
  }

  // Returns false when it is the request itself that had to go.
  bool preempt_for(std::size_t id) {
    const std::size_t victim = youngest();
    preempt(victim);
    return victim != id;
  }

  void preempt(std::size_t id) {
    if (prefilling_.size() + decoding_.size() == 1) {
      std::fprintf(stderr, "a request of %lld tokens does not fit\n",
                   static_cast<long long>(states_[id].length));
      std::exit(1);
    }
    release(id);
    std::erase(prefilling_, id);
    std::erase(decoding_, id);
    State& s = states_[id];
    s.to_prefill += s.length;
    s.length = 0;
    queue_.push_front(id);
    ++result_.n_preempted;
  }

  void release(std::size_t id) {
    call(
        [&] {
          memory_.release(id);
          return true;
        },
        nullptr);
  }

  void let_pass(double from, double until) {
    const DriverWork before = memory_.work();
    memory_.run_background(from, until);
    result_.in_background += memory_.work() - before;
    const auto n = static_cast<double>(prefilling_.size() + decoding_.size());
    result_.peak_concurrency = std::max(result_.peak_concurrency, n);
    if (!is_counted()) return;
    result_.held += memory_.held() * (until - from);
    result_.concurrency += n * (until - from);
    result_.weighted_s += until - from;
  }

  Memory& memory_;
  const std::span<const Request> requests_;
  const bool saturated_;
  std::vector<State> states_;
  double capacity_ = 0;
  std::deque<std::size_t> queue_;
  std::vector<std::size_t> prefilling_, decoding_;  // in the order of admission
  std::size_t n_done_ = 0;
  ReplayResult result_;
};

}  // namespace

ReplayResult replay(Memory& memory, std::span<const Request> requests, bool saturated) {
  return Engine(memory, requests, saturated).run();
}

}  // namespace kvspan::bench
