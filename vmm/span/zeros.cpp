#include "span/zeros.hpp"

#include <algorithm>

#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "span/edit.hpp"

namespace kvspan {

namespace {

// One driver failed at 5,637 mappings of one handle in one reservation.
constexpr std::uint64_t kMaxMappingsOfOneFrame = 4096;
// A gap takes at most one frame of each class below the largest, and a window has few gaps.
constexpr std::uint64_t kGapsInWindow = 4;
// What a set costs is about twice its largest frame.
constexpr Bytes kLargestZeros = kMiB * 32;

}  // namespace

Zeros::Zeros(FrameStore& store, CallCounters& account, std::uint64_t n_windows, Pages window)
    : store_(store), account_(account) {
  SizeClass largest{};
  while (largest < store.largest_class() && pages_of(largest) * 4 <= window &&
         size_of(pages_of(largest) * 2, store.page_size()) <= kLargestZeros) {
    ++largest.value;
  }
  try {
    add_set(largest);
    const auto largest_there = sets_[0].frames.size() - 1;
    const std::uint64_t most = (std::uint64_t{window.value} >> largest_there) + kGapsInWindow;
    windows_per_set_ = std::max<std::uint64_t>(1, kMaxMappingsOfOneFrame / most);
    while (sets_.size() * windows_per_set_ < n_windows) add_set(largest);
  } catch (...) {
    for (Span& home : homes_) close(home);
    throw;
  }
}

Zeros::~Zeros() {
  for (Span& home : homes_) close(home);
}

void Zeros::add_set(SizeClass largest) {
  Backend& backend = store_.backend();
  const Bytes page_size = store_.page_size();
  const Pages n_pages = pages_of(largest) * 2 - Pages(1);
  account_.add(Call::reserve, 1);
  const VirtualRange range = backend.reserve(size_of(n_pages, page_size), Unmapped::fault);
  Span& home = homes_.emplace_back(range.base, n_pages, page_size);
  const Stream stream = backend.own_stream();
  Edit edit(store_, account_, stream);
  const OwnerTag nobody = store_.new_owner();
  for (SizeClass c{}; c <= largest; ++c.value) {
    const Pages first = pages_of(c) - Pages(1);
    edit.back(home, {first, first + pages_of(c)}, nobody, true);
  }
  edit.commit();
  try {
    if (edit.has_queued_work()) backend.wait(backend.record_fence(stream));
  } catch (...) {
    backend.finish();
    throw;
  }
  // Where a class was short, smaller frames took its place: up to there the set goes.
  ZeroSet& set = sets_.emplace_back();
  for (SizeClass c{}; c <= largest; ++c.value) {
    const FrameId frame = home[pages_of(c) - Pages(1)].frame;
    if (frame.size_class() != c) break;
    set.frames.push_back(frame);
  }
}

void Zeros::close(Span& home) noexcept {
  try {
    Edit edit(store_, account_, {});
    edit.drop(home, {Pages(0), home.size()});
    edit.commit();
    if (home.is_broken()) return;
    account_.add(Call::free, 1);
    store_.backend().free({home.address_of(Pages(0)), size_of(home.size(), store_.page_size())});
  } catch (const std::exception&) {
    // It stays mapped, and its frames stay in use.
  }
}

void Zeros::keep_for_ever() noexcept {
  for (const ZeroSet& set : sets_) {
    for (const FrameId frame : set.frames) store_.keep_for_ever(frame);
  }
}

Bytes Zeros::size() const {
  Pages total{};
  for (const Span& home : homes_) total += home.backed_pages();
  return size_of(total, store_.page_size());
}

}  // namespace kvspan
