// Zeros to read where no memory is, on devices that have none of their own: a few frames of zeros,
// each mapped read-only at many places. They stand in the window at the start of a span, wherever
// no page is backed, so that kernels of static shape may read all of it.
//
// One frame of every size class up to some largest one makes a set, so that a gap of n pages takes
// O(log n) mappings; and a set serves only so many windows, because drivers limit how often one
// handle is mapped.
#pragma once

#include <list>
#include <vector>

#include "span/frame_store.hpp"
#include "span/span.hpp"

namespace kvspan {

class Zeros {
 public:
  // Enough for `n_windows` of up to `window` pages. Throws OutOfMemory, CapacityError, DriverError.
  Zeros(FrameStore& store, CallCounters& account, std::uint64_t n_windows, Pages window);
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  // Nothing of it is mapped in a window any more.
  ~Zeros();

  const ZeroSet& set_of(std::uint64_t window) const { return sets_[window / windows_per_set_]; }
  Bytes size() const;

  // Some mapping of them cannot be undone.
  void keep_for_ever() noexcept;

 private:
  void add_set(SizeClass largest);
  // Gives the frames in it back, or leaks them.
  void close(Span& home) noexcept;

  FrameStore& store_;
  CallCounters& account_;
  std::uint64_t windows_per_set_ = 1;
  std::list<Span> homes_;  // where the frames of a set were cleared, and stay mapped
  std::vector<ZeroSet> sets_;
};

}  // namespace kvspan
