// The frame pool: which frames are free, and how often each of the others is used. It deals in ids
// and counts only; what memory stands behind an id is the business of the layers above.
//
// One `IdPool` a size class. A frame taken has one reference; `share` adds one, `give` takes one
// away, and the frame whose last reference went is free again. The count is also what tells a
// double give: it is 0 exactly while the frame is free. (A give that comes after someone else took
// the frame anew takes that one's reference: no pool can tell the two apart.)
//
// All functions may be called from any thread at any time, none blocks and none allocates. What a
// thread did with a frame before it gave the frame back is visible to the one that takes it next.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "core/ids.hpp"

namespace kvspan {

class FramePool {
 public:
  struct Counts {
    std::uint64_t fresh = 0;   // never taken yet
    std::uint64_t free = 0;    // taken before, and given back
    std::uint64_t in_use = 0;  // referenced
  };

  // Frames of classes 0 to `largest`; of class c as many as `capacity` holds, which for all classes
  // together is more than the capacity: memory is budgeted above.
  // Throws InvalidArgument when the capacity needs more ids than a class has, or there is no such
  // class. Costs address space (some 8 bytes a page), and memory as frames are taken.
  FramePool(Pages capacity, SizeClass largest);
  // Threads have magazines (id_pool.hpp) while at least `lend_from` frames are free.
  FramePool(Pages capacity, SizeClass largest, std::uint32_t lend_from);
  ~FramePool();
  FramePool(const FramePool&) = delete;
  FramePool& operator=(const FramePool&) = delete;

  // Takes out.size() frames, adjacent ids where it can, recycled ones before fresh ones, each with
  // one reference. All or nothing: false, with `out` as it was, exactly when there are too few; a
  // class that the pool does not have has none.
  bool take(SizeClass c, std::span<FrameId> out) noexcept;

  // The same of recycled frames alone.
  bool take_recycled(SizeClass c, std::span<FrameId> out) noexcept;

  // Takes frames that were never taken before, and leaves the recycled ones to others.
  bool take_fresh(SizeClass c, std::span<FrameId> out) noexcept;

  // Adds a reference to each, of which the caller holds one. Returns how many were refused because
  // they are not in use (or have 2^32 - 1 references); those are left alone, the others are shared.
  std::uint32_t share(std::span<const FrameId> frames) noexcept;

  // Takes a reference from each; those without one left are free and are counted in `freed`. Ids
  // that are foreign or free already (a double give, also when two threads race) are `refused` and
  // left alone, the others are given back.
  struct Given {
    std::uint32_t freed = 0;
    std::uint32_t refused = 0;
  };
  Given give(std::span<const FrameId> frames) noexcept;

  // References to the frame; 0 when it is free or foreign.
  std::uint32_t references(FrameId frame) const noexcept;

  // Every frame of the class is counted once. Exact while nobody takes or gives; what calls that
  // are underway move, up to a few dozen frames each, may be on one side or the other.
  Counts counts(SizeClass c) const noexcept;
  SizeClass largest_class() const noexcept;

 private:
  class Class;  // one size class: its ids and its reference counts

  // Null when the pool does not have the class.
  Class* find(SizeClass c) const noexcept {
    return c.value < classes_.size() ? classes_[c.value].get() : nullptr;
  }

  std::array<std::unique_ptr<Class>, FrameId::kMaxClass + 1> classes_;
};

}  // namespace kvspan
