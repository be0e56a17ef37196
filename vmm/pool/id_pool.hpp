// The ids of one size class: those given back stand in a bitmap tree, those never taken begin at
// `bump`. One 64-bit word decides who gets how many: `admit` holds bump and the number of free ids,
// and a taker's one exchange on it takes some of both or, if the two together are too few, nothing.
// Only then it collects the ids it was admitted to.
//
// That it finds them is the invariant of the class: the tree never holds fewer ids than `free`
// counts plus takers are still owed. Returns keep it by adding to the tree *before* they add to
// `free`.
//
// All functions may be called from any thread at any time. None waits for another thread: a taker
// searches on only while others take ids from under its eyes, that is, while they progress.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "core/ids.hpp"
#include "pool/atomics.hpp"
#include "pool/bitmap_tree.hpp"

namespace kvspan {

class IdPool {
 public:
  // Two halves of one atomic word.
  struct Admission {
    std::uint32_t bump = 0;  // ids taken at least once: 0 to bump - 1
    std::uint32_t free = 0;  // of those, given back and not taken again
  };

  // The ids 0 to capacity - 1 of class c, all fresh.
  IdPool(SizeClass c, std::uint32_t capacity);

  // Takes out.size() ids, recycled before fresh ones. All or nothing: false, `out` untouched,
  // exactly when fewer are free and fresh. The memory of an id is as its last owner left it.
  bool take(std::span<FrameId> out) noexcept;

  // Takes ids that were never taken before; otherwise as `take`.
  bool take_fresh(std::span<FrameId> out) noexcept;

  Admission admission() const noexcept;
  // Whether the id was taken and not given back since.
  bool is_taken(std::uint32_t index) const noexcept {
    return index < admission().bump && !tree_.has(index);
  }
  std::uint32_t capacity() const noexcept { return capacity_; }

  // Gives ids back, in one step for `admit` and one for each run of ids that share a word of the
  // tree. They can be taken after `finish`, which must follow. An id that is free already, or was
  // never taken, is refused and left alone.
  class Return {
   public:
    struct Counts {
      std::uint32_t n_added = 0, n_refused = 0;
    };

    explicit Return(IdPool& pool) noexcept : pool_(pool), bump_(pool.admission().bump) {}
    Return(const Return&) = delete;
    Return& operator=(const Return&) = delete;

    void add(std::uint32_t index) noexcept {
      if (index / 64 != pending_.word) flush(index / 64);
      const std::uint64_t bit = std::uint64_t{1} << (index % 64);
      if (index >= bump_ || (pending_.mask & bit) != 0) {
        ++counts_.n_refused;
      } else {
        pending_.mask |= bit;
      }
    }
    Counts finish() noexcept;

   private:
    void flush(std::uint32_t next_word) noexcept;

    IdPool& pool_;
    const std::uint32_t bump_;  // of a moment when all that are given had been taken
    IdBits pending_;            // not in the tree yet
    Counts counts_;             // added to the tree, not to `admit`
  };

 private:
  friend struct PoolTestPeer;

  // Where a thread last found ids: the next search starts there. Threads share the few cursors by
  // their number; each starts in another part of the tree and has its own cache line, so that
  // threads neither take turns on one word of the tree nor on a cursor.
  static constexpr std::uint32_t kCursors = 8;
  static constexpr std::size_t kCacheLine = 64;
  struct alignas(kCacheLine) Cursor {
    Atomic<std::uint32_t> word{0xffffffffu};  // this value: nowhere yet
  };

  template <class Change>
  std::optional<Admission> admit(const Change& change) noexcept;
  void collect(std::span<FrameId> out, std::uint32_t bump) noexcept;

  alignas(kCacheLine) Atomic<std::uint64_t> admit_{0};  // bump above, free below
  alignas(kCacheLine) const SizeClass class_;
  const std::uint32_t capacity_;
  BitmapTree tree_;
  std::array<Cursor, kCursors> cursors_;
};

}  // namespace kvspan
