// What threads did to a pool and when: each call with its arguments, its result and the time that
// it took, noted by the thread itself in a log of its own.
//
// The stamps are those of a clock and not of a counter that all threads share: they would take
// turns on it, and its order would make up for one that the pool lacks. CLOCK_MONOTONIC is one for
// all processors, and Linux reads it like a load that nothing overtakes (rdtsc_ordered): of two
// calls, one is before the other when it ended at a smaller time than the other one began at.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pool/support.hpp"

namespace kvspan_test {

struct Operation {
  enum class Kind { take, take_recycled, take_fresh, share, give, references };
  using Stamp = std::chrono::steady_clock::rep;
  static constexpr std::size_t kMostFrames = 4;

  Kind kind = Kind::take;
  std::array<FrameId, kMostFrames> named{};  // what was asked about, or was taken
  std::size_t n_frames = 0;
  bool is_refused = false;    // a take
  std::uint32_t result = 0;   // of a share: refused, of a give: freed, of references: how many
  std::uint32_t refused = 0;  // of a give
  Stamp begin = 0, end = 0;

  std::span<const FrameId> frames() const { return std::span(named).first(n_frames); }
  bool is_take() const { return kind <= Kind::take_fresh; }
};

// One thread's, in the order in which it did them.
using Log = std::vector<Operation>;

// With its stamps counted from `origin`.
std::string describe(const Operation& operation, Operation::Stamp origin);

// Does what it is asked to and notes it. One thread's.
template <class Pool>
class Recorder {
 public:
  // Room for so many operations, so that noting one allocates nothing.
  Recorder(Pool& pool, std::size_t most_operations) : pool_(&pool) {
    log_.reserve(most_operations);
  }

  // None when the pool refuses.
  std::span<const FrameId> take(Operation::Kind kind, std::size_t n) {
    Operation& operation = add(kind, n);
    const std::span<FrameId> out = std::span(operation.named).first(n);
    const bool is_taken = timed(operation, [&] {
      switch (kind) {
        case Operation::Kind::take_recycled:
          return pool_->take_recycled(kClass, out);
        case Operation::Kind::take_fresh:
          return pool_->take_fresh(kClass, out);
        default:
          return pool_->take(kClass, out);
      }
    });
    operation.is_refused = !is_taken;
    return operation.frames().first(is_taken ? n : 0);
  }

  void share(std::span<const FrameId> frames) {
    Operation& operation = add(Operation::Kind::share, frames);
    operation.result = timed(operation, [&] { return pool_->share(frames); });
  }

  void give(std::span<const FrameId> frames) {
    Operation& operation = add(Operation::Kind::give, frames);
    const FramePool::Given given = timed(operation, [&] { return pool_->give(frames); });
    operation.result = given.freed;
    operation.refused = given.refused;
  }

  void references(FrameId frame) {
    Operation& operation = add(Operation::Kind::references, {&frame, 1});
    operation.result = timed(operation, [&] { return pool_->references(frame); });
  }

  const Log& log() const { return log_; }

 private:
  static constexpr SizeClass kClass{0};

  static Operation::Stamp now() {
    return std::chrono::steady_clock::now().time_since_epoch().count();
  }

  template <class Call>
  static auto timed(Operation& operation, const Call& call) {
    operation.begin = now();
    const auto result = call();
    operation.end = now();
    return result;
  }

  Operation& add(Operation::Kind kind, std::size_t n) {
    log_.push_back({.kind = kind, .n_frames = n});
    return log_.back();
  }
  Operation& add(Operation::Kind kind, std::span<const FrameId> frames) {
    Operation& operation = add(kind, frames.size());
    std::copy(frames.begin(), frames.end(), operation.named.begin());
    return operation;
  }

  Pool* pool_;
  Log log_;
};

}  // namespace kvspan_test
