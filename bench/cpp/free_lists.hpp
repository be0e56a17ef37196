// The free lists that bench/cpp/pool.cpp compares, and one way to use them all: a `Worker` is a
// thread's access to a list; `take` is all or nothing, `give` returns how many frames were refused.
// Lists of others that the compiler does not find are left out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <type_traits>
#include <vector>
#if __has_include(<boost/lockfree/stack.hpp>)
#include <boost/lockfree/stack.hpp>
#define KVSPAN_BOOST_STACK
#endif
#if __has_include(<concurrentqueue/concurrentqueue.h>)
#include <concurrentqueue/concurrentqueue.h>
#define KVSPAN_MOODYCAMEL_QUEUE
#endif

#include "pool/frame_pool.hpp"

namespace kvspan::bench {

inline constexpr SizeClass kSingle{0};

// The simplest: a vector behind a mutex; with `kChecks` it counts references and refuses what the
// pool refuses.
template <bool kChecks>
class MutexList {
 public:
  explicit MutexList(std::uint32_t n) : references_(kChecks ? n : 0) {
    free_.reserve(n);
    for (std::uint32_t i = 0; i < n; ++i) free_.push_back(FrameId(kSingle, i));
  }

  bool take(std::span<FrameId> out) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < out.size()) return false;
    const std::size_t left = free_.size() - out.size();
    std::copy_n(free_.data() + left, out.size(), out.data());
    free_.resize(left);
    if constexpr (kChecks) {
      for (const FrameId frame : out) references_[frame.index()] = 1;
    }
    return true;
  }

  std::uint32_t give(std::span<const FrameId> frames) {
    const std::lock_guard lock(mutex_);
    if constexpr (!kChecks) {
      free_.insert(free_.end(), frames.begin(), frames.end());
      return 0;
    }
    std::uint32_t n_refused = 0;
    for (const FrameId frame : frames) {
      const bool is_ours = frame.size_class() == kSingle && frame.index() < references_.size();
      if (!is_ours || references_[frame.index()] == 0) {
        ++n_refused;
      } else if (--references_[frame.index()] == 0) {
        free_.push_back(frame);
      }
    }
    return n_refused;
  }

  template <class F>
  void holding(F f) {
    const std::lock_guard lock(mutex_);
    f();
  }

 private:
  std::mutex mutex_;  // guards both
  std::vector<FrameId> free_;
  std::vector<std::uint32_t> references_;
};

template <class List>
struct Worker {
  static constexpr bool kChecks = std::is_same_v<List, MutexList<true>>;
  static auto make(std::uint32_t n) { return std::make_unique<List>(n); }
  bool take(std::span<FrameId> out) { return list.take(out); }
  std::uint32_t give(std::span<const FrameId> frames) { return list.give(frames); }
  List& list;
};

template <>
struct Worker<FramePool> {
  static constexpr bool kChecks = true;
  static auto make(std::uint32_t n) { return std::make_unique<FramePool>(Pages(n), kSingle); }
  bool take(std::span<FrameId> out) { return list.take(kSingle, out); }
  std::uint32_t give(std::span<const FrameId> frames) { return list.give(frames).refused; }
  FramePool& list;
};

#ifdef KVSPAN_BOOST_STACK
using BoostStack = boost::lockfree::stack<FrameId>;

template <>
struct Worker<BoostStack> {
  static constexpr bool kChecks = false;
  static auto make(std::uint32_t n) {
    auto stack = std::make_unique<BoostStack>(n);
    for (std::uint32_t i = 0; i < n; ++i) stack->bounded_push(FrameId(kSingle, i));
    return stack;
  }
  bool take(std::span<FrameId> out) {
    std::size_t n = 0;
    while (n < out.size() && list.pop(out[n])) ++n;
    if (n < out.size()) give(out.first(n));
    return n == out.size();
  }
  std::uint32_t give(std::span<const FrameId> frames) {
    if (!frames.empty()) list.push(frames.begin(), frames.end());
    return 0;
  }
  BoostStack& list;
};
#endif

#ifdef KVSPAN_MOODYCAMEL_QUEUE
using MoodycamelQueue = moodycamel::ConcurrentQueue<FrameId>;

template <>
struct Worker<MoodycamelQueue> {
  static constexpr bool kChecks = false;
  static auto make(std::uint32_t n) {
    auto queue = std::make_unique<MoodycamelQueue>(n);
    for (std::uint32_t i = 0; i < n; ++i) queue->enqueue(FrameId(kSingle, i));
    return queue;
  }
  bool take(std::span<FrameId> out) {
    std::size_t n = 0;
    while (n < out.size()) {
      const std::size_t got = list.try_dequeue_bulk(consumer, out.data() + n, out.size() - n);
      // Beside others it may find nothing where there is something.
      if (got == 0 && list.size_approx() < out.size() - n) break;
      n += got;
    }
    if (n < out.size()) give(out.first(n));
    return n == out.size();
  }
  std::uint32_t give(std::span<const FrameId> frames) {
    const bool done = list.enqueue_bulk(producer, frames.data(), frames.size());
    return done ? 0 : static_cast<std::uint32_t>(frames.size());
  }
  MoodycamelQueue& list;
  moodycamel::ProducerToken producer{list};
  moodycamel::ConsumerToken consumer{list};
};
#endif

// Calls f with each kind of list, as the empty value that stands for its type, and its name.
template <class F>
void for_each_list(F f) {
  f(std::type_identity<FramePool>{}, "frame pool");
  f(std::type_identity<MutexList<true>>{}, "mutex with checks");
  f(std::type_identity<MutexList<false>>{}, "mutex");
#ifdef KVSPAN_MOODYCAMEL_QUEUE
  f(std::type_identity<MoodycamelQueue>{}, "moodycamel queue");
#endif
#ifdef KVSPAN_BOOST_STACK
  f(std::type_identity<BoostStack>{}, "boost stack");
#endif
}

}  // namespace kvspan::bench
