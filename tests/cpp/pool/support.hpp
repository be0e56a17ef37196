// What the pool's tests share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "pool/frame_pool.hpp"
#include "pool/id_pool.hpp"

namespace kvspan {

// Reaches into the pool for states that otherwise last a few nanoseconds of another thread's time.
struct PoolTestPeer {
  // As if a thread had cleared the hints of an emptied word and slept before looking at it again.
  static void hide(BitmapTree& tree, std::uint32_t word) {
    constexpr auto seq_cst = std::memory_order_seq_cst;
    tree.marks_[word / 64].fetch_and(~(std::uint64_t{1} << (word % 64)), seq_cst);
    tree.regions_[word / 64 / 64].fetch_and(~(std::uint64_t{1} << (word / 64 % 64)), seq_cst);
  }
  // As if a thread had emptied the word and slept before clearing the hints.
  static void mark_stale(BitmapTree& tree, std::uint32_t word) { tree.mark(word); }
  // As if a thread had emptied the word, slept, and went on.
  static void unmark_late(BitmapTree& tree, std::uint32_t word) { tree.unmark(word); }
  static BitmapTree& tree(IdPool& pool) { return pool.tree_; }

  // Whether the hints lead to every id of the tree.
  static bool hints_are_complete(const BitmapTree& tree) {
    constexpr auto relaxed = std::memory_order_relaxed;
    for (std::uint32_t word = 0; word < tree.n_words_; ++word) {
      if (BitmapTree::open_ids_of(tree.leaves_[word].load(relaxed)) == 0) continue;
      const std::uint32_t i = word / 64;
      if ((tree.marks_[i].load(relaxed) >> (word % 64) & 1) == 0) return false;
      if ((tree.regions_[i / 64].load(relaxed) >> (i % 64) & 1) == 0) return false;
    }
    return true;
  }
};

}  // namespace kvspan

namespace kvspan_test {

using kvspan::FrameId;
using kvspan::FramePool;
using kvspan::Pages;
using kvspan::SizeClass;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// `n` frames of the class; none of them when the pool refused.
inline std::vector<FrameId> take(FramePool& pool, SizeClass c, std::size_t n) {
  std::vector<FrameId> frames(n);
  if (!pool.take(c, frames)) frames.clear();
  return frames;
}

// In how many runs of adjacent frames they lie.
inline std::size_t n_runs(std::vector<FrameId> frames) {
  std::sort(frames.begin(), frames.end());
  std::size_t n = frames.empty() ? 0 : 1;
  for (std::size_t i = 1; i < frames.size(); ++i) n += frames[i] != frames[i - 1].next();
  return n;
}

inline bool all_distinct(std::vector<FrameId> frames) {
  std::sort(frames.begin(), frames.end());
  return std::adjacent_find(frames.begin(), frames.end()) == frames.end();
}

// The same sequence with every standard library, which std::uniform_int_distribution is not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint32_t below(std::size_t n) { return static_cast<std::uint32_t>(engine_() % n); }

 private:
  std::mt19937_64 engine_;
};

// Runs f(0) ... f(n_threads - 1) on as many threads, all let go at once.
template <class F>
void run_threads(int n_threads, F f) {
  std::atomic<int> n_waiting{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < n_threads; ++i) {
    threads.emplace_back([&, i] {
      n_waiting.fetch_add(1);
      while (n_waiting.load() < n_threads) std::this_thread::yield();
      f(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace kvspan_test
