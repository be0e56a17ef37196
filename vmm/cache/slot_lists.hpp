// The slots of a cache, listed by what they keep mapped, so that finding one does not mean looking
// at all: free slots by their pages, and the live ones that hold more than they need.
//
// A free slot stands in the list of its number of pages: each of the numbers below 32 has its own,
// above it 16 lists share each power of two (two-level segregated fit), so a fit is within a
// sixteenth of the best. A list is in the order in which slots came: the one at its front is the
// one whose work is most likely done. All functions take constant time and none allocates. Guarded
// by the cache's mutex.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/ids.hpp"

namespace kvspan {

class SlotLists {
 public:
  explicit SlotLists(std::size_t n_slots) : links_(n_slots) {}

  void put_free(SlotId slot, Pages pages) noexcept { put(slot, list_of(pages)); }
  void put_surplus(SlotId slot) noexcept { put(slot, kSurplus); }
  void remove(SlotId slot) noexcept;

  std::optional<SlotId> first_surplus() const noexcept { return slot_at(heads_[kSurplus].first); }

  // Calls f(slot) for free slots until it returns true: from those with `pages` upwards (first come
  // some with a sixteenth less), or from those with `pages` downwards (with a sixteenth more).
  template <class F>
  void ascending(Pages pages, F f) const {
    for (int list = next_up(list_of(pages)); list >= 0; list = next_up(list + 1)) {
      if (visit(list, f)) return;
    }
  }
  template <class F>
  void descending(Pages pages, F f) const {
    for (int list = next_down(list_of(pages)); list >= 0; list = next_down(list - 1)) {
      if (visit(list, f)) return;
    }
  }

 private:
  static constexpr unsigned kSubBits = 4;
  static constexpr unsigned kExactBits = kSubBits + 1;  // numbers of so many bits: a list each
  static constexpr int kLists = (32 - kExactBits + 2) << kSubBits;
  static constexpr int kSurplus = kLists;
  static constexpr std::int32_t kNone = -1;

  struct Head {
    std::int32_t first = kNone, last = kNone;
  };
  struct Link {
    std::int32_t list = kNone, before = kNone, after = kNone;
  };

  static int list_of(Pages pages) noexcept {
    const auto bits = static_cast<unsigned>(std::bit_width(pages.value));
    if (bits <= kExactBits) return static_cast<int>(pages.value);
    const unsigned shift = bits - kExactBits;
    return static_cast<int>((shift << kSubBits) + (pages.value >> shift));
  }
  static std::optional<SlotId> slot_at(std::int32_t i) noexcept {
    return i == kNone ? std::nullopt : std::optional(SlotId(i));
  }

  Link& link(std::int32_t i) noexcept { return links_[static_cast<std::size_t>(i)]; }
  Head& head(int list) noexcept { return heads_[static_cast<std::size_t>(list)]; }
  void put(SlotId slot, int list) noexcept;
  // The nearest list that is not empty, from `list` on; -1: there is none.
  int next_up(int list) const noexcept;
  int next_down(int list) const noexcept;

  template <class F>
  bool visit(int list, F& f) const {
    for (std::int32_t i = heads_[static_cast<std::size_t>(list)].first; i != kNone;
         i = links_[static_cast<std::size_t>(i)].after) {
      if (f(SlotId(i))) return true;
    }
    return false;
  }

  std::vector<Link> links_;
  std::array<Head, kLists + 1> heads_;
  std::array<std::uint64_t, kLists / 64 + 1> filled_{};  // a bit for each list that is not empty
};

}  // namespace kvspan
