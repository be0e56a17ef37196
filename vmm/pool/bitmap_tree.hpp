// A lock-free set of small integers: the free ids of a pool, one bit each, in three levels.
//
//   leaves_   words of 32 ids, a bit each, 1 = in the set. The only truth.
//   marks_    one bit a leaf word, 1 = that word may hold a bit
//   regions_  one bit a word of marks, 1 = that word may hold a bit
//
// A bitmap has no links, hence neither an ABA problem nor tags against it; whoever flips a leaf bit
// owns the id, so adding an id twice shows in the old value, also when two threads race; and a word
// shows 32 neighbours at once, so adjacent ids can be looked for. The two upper levels are hints
// that make finding a bit cheap. A hint may be stale for as long as a thread stands between
// changing a word and correcting its hint, but never for longer: bitmap_tree.cpp has the argument.
// For that meantime there is `scan`, which trusts no hint.
//
// A word can be lent: it then serves those who know of it, by `claim_lent`, and is passed over by
// all others until it is recalled. Its ids are in the set as before, and ids are added to it as
// before; one bit beside them, which every change of the word sees, says that it is lent.
//
// Every function may be called from any thread at any time, and none waits for another thread.
#pragma once

#include <cstdint>
#include <optional>

#include "pool/atomics.hpp"
#include "pool/id_bits.hpp"

namespace kvspan {

class BitmapTree {
 public:
  // An empty set that has room for the ids 0 to n_ids - 1.
  explicit BitmapTree(std::uint32_t n_ids);

  struct Added {
    std::uint32_t already = 0;  // those that were in the set before, as a mask; nothing changed
    bool is_lent = false;       // the word is
  };
  // Adds the ids. Everything the caller did before is visible to the thread that claims them.
  Added set(IdBits ids) noexcept {
    // seq_cst for the argument in bitmap_tree.cpp; as a release it also hands the ids' memory to
    // their next owner.
    const std::uint64_t before = leaves_[ids.word].fetch_or(ids.mask, std::memory_order_seq_cst);
    const bool is_lent = (before & kLent) != 0;
    if (!is_lent) mark(ids.word);
    return {ids_of(before) & ids.mask, is_lent};
  }

  // Removes and returns 1 to `want` ids of one word, in as few runs of adjacent ids as a short
  // search starting at word `from` can find. None when it found no bit, which says nothing about
  // the set while other threads are busy: a caller that knows of a bit goes on to `scan`.
  // Precondition: want > 0, from < n_words().
  IdBits claim(std::uint32_t from, std::uint32_t want) noexcept;

  // The same from the first of the words 0 to end - 1 that has a bit, hints disregarded. O(end).
  // Precondition: want > 0, end <= n_words().
  IdBits scan(std::uint32_t end, std::uint32_t want) noexcept;

  // A word that has `want` adjacent ids, found as `claim` does, as it is now. None if there is none
  // nearby.
  std::optional<IdBits> find(std::uint32_t from, std::uint32_t want) const noexcept;

  // Lends the word and removes the ids `claimed`, if the word has the ids `seen` and is not lent.
  bool lend(IdBits seen, std::uint32_t claimed) noexcept;

  // Removes and returns `want` adjacent ids of the word; 0 when it has none or is not lent.
  // Precondition: want > 0, word < n_words().
  std::uint32_t claim_lent(std::uint32_t word, std::uint32_t want) noexcept {
    const auto leaf = leaves_[word];
    // relaxed: only a guess, which the exchange below checks.
    std::uint64_t seen = leaf.load(std::memory_order_relaxed);
    while ((seen & kLent) != 0 && ids_of(seen) != 0) {
      const Run run = longest_run(ids_of(seen), want);
      if (run.length < want) break;
      // Orders: see claim_in.
      if (leaf.compare_exchange_weak(seen, seen & ~std::uint64_t{run.mask()},
                                     std::memory_order_acquire, std::memory_order_relaxed)) {
        return run.mask();
      }
    }
    return 0;
  }

  // How many ids a lent word has.
  std::uint32_t n_lent(std::uint32_t word) const noexcept;

  // Ends a loan. Returns how many ids the word has. Precondition: it is lent, and nobody else ends
  // that.
  std::uint32_t recall(std::uint32_t word) noexcept;

  // Whether the id is in the set now.
  bool has(std::uint32_t id) const noexcept {
    // relaxed: of some moment; who needs more knows it from elsewhere.
    const std::uint64_t leaf = leaves_[id / kIdsPerWord].load(std::memory_order_relaxed);
    return (leaf >> (id % kIdsPerWord) & 1) != 0;
  }

  std::uint32_t n_words() const noexcept { return n_words_; }

 private:
  friend struct PoolTestPeer;
  static constexpr std::uint32_t kNoWord = 0xffffffffu;
  static constexpr std::uint64_t kLent = std::uint64_t{1} << 32;

  struct Candidate {
    std::uint32_t word = kNoWord;
    std::uint32_t ids = 0;
    std::uint32_t run = 0;  // the longest, up to what is wanted
  };

  static constexpr std::uint32_t ids_of(std::uint64_t leaf) {
    return static_cast<std::uint32_t>(leaf);
  }
  // Those that anybody may claim.
  static constexpr std::uint32_t open_ids_of(std::uint64_t leaf) {
    return (leaf & kLent) != 0 ? 0 : ids_of(leaf);
  }

  IdBits claim_in(std::uint32_t word, std::uint32_t want) noexcept;
  Candidate best_word(std::uint32_t from, std::uint32_t want) const noexcept;
  std::uint32_t next_marked(std::uint32_t from) const noexcept;
  void mark(std::uint32_t word) noexcept;
  void unmark(std::uint32_t word) noexcept;

  std::uint32_t n_words_, n_mark_words_, n_region_words_;
  AtomicArray<std::uint64_t> leaves_, marks_, regions_;
};

}  // namespace kvspan
