// The ids of one size class: those given back stand in a bitmap tree, those never taken begin at
// `bump`. One 64-bit word decides who gets how many: `admit` holds bump and the number of free ids,
// and a taker's one exchange on it takes some of both or, if the two together are too few, nothing.
// Only then it collects the ids it was admitted to.
//
// That it finds them is the invariant of the class: the tree never holds fewer ids than `free`
// counts plus takers are still owed. Givers keep it by adding to the tree *before* they add to
// `free`.
//
// One word that every call changes is what threads would wait for in turns. Therefore, while many
// ids are free, each thread has a magazine: a word of the tree that is lent to it, whose ids `free`
// does not count. Taking from it, and giving back to it, is one exchange on that word and nothing
// else. Who finds too few ids recalls all that is lent first, so magazines keep no id from anybody.
//
// All functions may be called from any thread at any time. None waits for another thread, with one
// exception: a taker who is about to be refused while another one stands in the middle of lending
// or recalling a word lets it finish, within reason (kPatience).
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <span>

#include "core/ids.hpp"
#include "pool/atomics.hpp"
#include "pool/bitmap_tree.hpp"

namespace kvspan {

class IdPool {
 public:
  struct Counts {
    std::uint32_t fresh = 0;  // never taken yet
    std::uint32_t free = 0;   // taken before, and given back
  };

  // Words are lent while at least so many ids are free.
  static constexpr std::uint32_t kLendFrom = 1024;

  // The ids 0 to capacity - 1 of class c, all fresh.
  IdPool(SizeClass c, std::uint32_t capacity, std::uint32_t lend_from = kLendFrom);

  // Takes out.size() ids, recycled before fresh ones. All or nothing: false, `out` untouched,
  // exactly when fewer are free and fresh. The memory of an id is as its last owner left it.
  bool take(std::span<FrameId> out) noexcept {
    return take_lent(out) || take_elsewhere(out, capacity_);
  }

  // Takes recycled ids only; otherwise as `take`.
  bool take_recycled(std::span<FrameId> out) noexcept {
    return take_lent(out) || take_elsewhere(out, 0);
  }

  // Takes ids that were never taken before; otherwise as `take`.
  bool take_fresh(std::span<FrameId> out) noexcept;

  // Exact while nobody takes or gives; a word that another thread lends or recalls meanwhile may be
  // counted twice or not at all.
  Counts counts() const noexcept;
  // Whether the id was taken and not given back since.
  bool is_taken(std::uint32_t index) const noexcept {
    return index < admission().bump && !tree_.has(index);
  }
  std::uint32_t capacity() const noexcept { return capacity_; }

  struct Given {
    std::uint32_t freed = 0;
    std::uint32_t refused = 0;
  };
  // Gives ids back, but for those that stay in use: of some ids of one word, `kept_of(ids)` returns
  // these as a mask; it is asked once for each. One step for those in a row that share a word of
  // the tree, and one for `admit`, after which they can be taken. Ids that are free already, or
  // were never taken, are refused and left alone.
  template <class KeptOf>
  Given give(std::span<const FrameId> ids, const KeptOf& kept_of) noexcept {
    Given given;
    // Of a moment when all that are given had been taken.
    const std::uint32_t bump = admission().bump;
    std::uint32_t n_open = 0;
    for (auto id = ids.begin(); id != ids.end();) {
      IdBits bits{id->index() / kIdsPerWord, 0};
      std::uint32_t n = 0;
      for (; id != ids.end() && id->index() / kIdsPerWord == bits.word; ++id) {
        const std::uint32_t bit = std::uint32_t{1} << (id->index() % kIdsPerWord);
        if ((bits.mask & bit) != 0) break;  // twice in a row: the next round refuses it
        bits.mask |= bit;
        ++n;
      }
      if (bits.word >= bump / kIdsPerWord) [[unlikely]] {
        given.refused += remove(fresh_ids(bits.word, bump), bits, n);
        if (bits.mask == 0) continue;
      }
      if (const std::uint32_t kept = kept_of(bits); kept != 0) [[unlikely]] {
        remove(kept, bits, n);
      }
      if (bits.mask == 0) continue;
      const BitmapTree::Added added = tree_.set(bits);
      if (added.already != 0) [[unlikely]] {
        given.refused += remove(added.already, bits, n);
      }
      given.freed += n;
      if (!added.is_lent) n_open += n;
    }
    // release: the bits come first, so that no taker is admitted to an id that it cannot find.
    if (n_open != 0) admit_.fetch_add(n_open, std::memory_order_release);
    return given;
  }

 private:
  friend struct PoolTestPeer;

  // The three parts of `admit`.
  struct Admission {
    std::uint32_t bump = 0;    // ids taken at least once: 0 to bump - 1
    std::uint32_t free = 0;    // of those, given back and not taken again, and not lent
    std::uint32_t n_lent = 0;  // words lent, or about to be, or recalled and not yet in `free`

    static constexpr std::uint32_t kMaxLent = 255;
    static constexpr std::uint64_t kOneLent = std::uint64_t{1} << 56;
    static constexpr std::uint64_t kFreeMask = (std::uint64_t{1} << 28) - 1;
    static_assert(FrameId::kMaxIndex < kFreeMask);

    constexpr std::uint64_t packed() const {
      return n_lent * kOneLent | std::uint64_t{bump} << 28 | free;
    }
    static constexpr Admission unpacked(std::uint64_t word) {
      return {static_cast<std::uint32_t>(word >> 28 & kFreeMask),
              static_cast<std::uint32_t>(word & kFreeMask),
              static_cast<std::uint32_t>(word / kOneLent)};
    }
  };

  // What a thread has for itself, or shares with the few that have the same number: its own cache
  // line, and places of the tree apart from those of the others.
  static constexpr std::size_t kCacheLine = 64;
  static constexpr std::uint32_t kNone = 0xffffffffu;
  struct alignas(kCacheLine) Magazine {
    // The word lent to it. Who exchanges it for another value, and nobody else, recalls the word.
    Atomic<std::uint32_t> word{kNone};
    Atomic<std::uint32_t> cursor{kNone};  // where ids were last found: the next search starts there
  };

  Admission admission() const noexcept {
    // acquire: who reads a count also sees what was done before it came about.
    return Admission::unpacked(admit_.load(std::memory_order_acquire));
  }

  // Fills the start of `out` and returns what is left of it.
  std::span<FrameId> write(IdBits ids, std::span<FrameId> out) const noexcept {
    FrameId* next = out.data();
    for_each_run(ids.mask, [&](Run run) {
      const std::uint32_t first = ids.word * kIdsPerWord + run.start;
      for (std::uint32_t i = 0; i < run.length; ++i) *next++ = FrameId(class_, first + i);
    });
    return out.subspan(static_cast<std::size_t>(next - out.data()));
  }

  // Of the word, those that were not taken yet.
  static constexpr std::uint32_t fresh_ids(std::uint32_t word, std::uint32_t bump) {
    const std::uint32_t first = word * kIdsPerWord;
    if (bump <= first) return ~std::uint32_t{0};
    return bump - first < kIdsPerWord ? ~std::uint32_t{0} << (bump - first) : 0;
  }

  // Takes `ids` out of the `n` that `bits` has. Returns how many these were.
  static std::uint32_t remove(std::uint32_t ids, IdBits& bits, std::uint32_t& n) {
    const auto n_removed = static_cast<std::uint32_t>(std::popcount(bits.mask & ids));
    bits.mask &= ~ids;
    n -= n_removed;
    return n_removed;
  }

  // From this thread's magazine, if that has as many side by side.
  bool take_lent(std::span<FrameId> out) noexcept {
    if (out.size() - 1 >= kIdsPerWord) return false;
    // relaxed: a word to try; it says itself whether it is lent.
    const std::uint32_t word = magazines_[thread_number()].word.load(std::memory_order_relaxed);
    if (word == kNone) return false;
    const std::uint32_t mask = tree_.claim_lent(word, static_cast<std::uint32_t>(out.size()));
    if (mask == 0) return false;
    write({word, mask}, out);
    return true;
  }

  // With ids that are fresh as long as fewer than `limit` are not.
  bool take_elsewhere(std::span<FrameId> out, std::uint32_t limit) noexcept;
  std::uint32_t begin_search(std::uint32_t bump) noexcept;
  bool refill(std::span<FrameId> out) noexcept;
  void recall(std::uint32_t word) noexcept;
  void recall_all() noexcept;
  bool take_admitted(std::span<FrameId> out, std::uint32_t limit) noexcept;
  void collect(std::span<FrameId> out, std::uint32_t bump) noexcept;

  alignas(kCacheLine) Atomic<std::uint64_t> admit_{0};
  alignas(kCacheLine) const SizeClass class_;
  const std::uint32_t capacity_, lend_from_;
  BitmapTree tree_;
  std::array<Magazine, kThreadNumbers> magazines_;
};

}  // namespace kvspan
