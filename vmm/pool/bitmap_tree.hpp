// A lock-free set of small integers: the free ids of a pool, one bit each, in three levels.
//
//   leaves_   one bit an id, 1 = in the set. The only truth.
//   marks_    one bit a leaf word, 1 = that word may hold a bit
//   regions_  one bit a word of marks, 1 = that word may hold a bit
//
// A bitmap has no links, hence neither an ABA problem nor tags against it; whoever flips a leaf bit
// owns the id, so adding an id twice shows in the old value, also when two threads race; and a word
// shows 64 neighbours at once, so adjacent ids can be looked for. The two upper levels are hints
// that make finding a bit cheap. A hint may be stale for as long as a thread stands between
// changing a word and correcting its hint, but never for longer: bitmap_tree.cpp has the argument.
// For that meantime there is `scan`, which trusts no hint.
//
// Every function may be called from any thread at any time, and none waits for another thread.
#pragma once

#include <cstdint>

#include "pool/atomics.hpp"

namespace kvspan {

// Some of the ids word * 64 to word * 64 + 63, bit i standing for the i-th. An empty mask is
// "none".
struct IdBits {
  std::uint32_t word = 0;
  std::uint64_t mask = 0;
};

class BitmapTree {
 public:
  // An empty set that has room for the ids 0 to n_ids - 1.
  explicit BitmapTree(std::uint32_t n_ids);

  // Adds the ids. Returns those that were in the set already (as a mask), which changes nothing for
  // them. Everything the caller did before is visible to the thread that claims the ids.
  std::uint64_t set(IdBits ids) noexcept;

  // Removes and returns 1 to `want` ids of one word, in as few runs of adjacent ids as a short
  // search starting at word `from` can find. None when it found no bit, which says nothing about
  // the set while other threads are busy: a caller that knows of a bit goes on to `scan`.
  // Precondition: want > 0, from < n_words().
  IdBits claim(std::uint32_t from, std::uint32_t want) noexcept;

  // The same from the first of the words 0 to end - 1 that has a bit, hints disregarded. O(end).
  // Precondition: want > 0, end <= n_words().
  IdBits scan(std::uint32_t end, std::uint32_t want) noexcept;

  // Whether the id is in the set now.
  bool has(std::uint32_t id) const noexcept {
    return (leaves_[id / 64].load(std::memory_order_relaxed) >> (id % 64) & 1) != 0;
  }

  std::uint32_t n_words() const noexcept { return n_words_; }

 private:
  friend struct PoolTestPeer;
  static constexpr std::uint32_t kNoWord = 0xffffffffu;

  IdBits claim_in(std::uint32_t word, std::uint32_t want) noexcept;
  std::uint32_t best_word(std::uint32_t from, std::uint32_t want) const noexcept;
  std::uint32_t next_marked(std::uint32_t from) const noexcept;
  void mark(std::uint32_t word) noexcept;
  void unmark(std::uint32_t word) noexcept;

  std::uint32_t n_words_, n_mark_words_, n_region_words_;
  AtomicArray<std::uint64_t> leaves_, marks_, regions_;
};

}  // namespace kvspan
