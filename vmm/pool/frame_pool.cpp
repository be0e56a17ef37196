// Whether a frame is free is said by the tree of ids alone: who adds an id that is there already
// has given it twice, and sees so in the old bits, also when two threads race. So the common frame,
// which one holder takes and gives back, costs no operation of its own: neighbours change together,
// in one word. References beyond the first are counted beside, and a bit for each frame, again with
// its neighbours', says whether it was ever shared, so that most counts are never looked at.
#include "pool/frame_pool.hpp"

#include <bit>
#include <limits>
#include <string>

#include "core/errors.hpp"
#include "pool/atomics.hpp"
#include "pool/id_pool.hpp"

namespace kvspan {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acquire = std::memory_order_acquire;
constexpr std::memory_order release = std::memory_order_release;

constexpr std::uint32_t kMostMore = std::numeric_limits<std::uint32_t>::max() - 1;

}  // namespace

class FramePool::Class {
 public:
  Class(SizeClass c, std::uint32_t capacity, std::uint32_t lend_from)
      : ids_(c, capacity, lend_from), more_(capacity), shared_(capacity / kIdsPerWord + 1) {}

  bool take(std::span<FrameId> out) noexcept { return ids_.take(out); }
  bool take_recycled(std::span<FrameId> out) noexcept { return ids_.take_recycled(out); }
  bool take_fresh(std::span<FrameId> out) noexcept { return ids_.take_fresh(out); }

  bool share(std::uint32_t index) noexcept {
    if (!ids_.is_taken(index)) return false;
    const auto shared = shared_[index / kIdsPerWord];
    const std::uint32_t bit = std::uint32_t{1} << (index % kIdsPerWord);
    // relaxed: who comes to hold a reference by this, or gives back the one that it came from, has
    // heard of it.
    if ((shared.load(relaxed) & bit) == 0) shared.fetch_or(bit, relaxed);
    const auto more = more_[index];
    std::uint32_t seen = more.load(relaxed);
    do {
      if (seen == kMostMore) return false;
      // relaxed: a new reference comes from one that is there, whose holder passes it on.
    } while (!more.compare_exchange_weak(seen, seen + 1, relaxed, relaxed));
    return true;
  }

  // All frames are of this class.
  IdPool::Given give(std::span<const FrameId> frames) noexcept {
    return ids_.give(frames, [this](IdBits ids) { return drop_more(ids); });
  }

  std::uint32_t references(std::uint32_t index) const noexcept {
    // relaxed: a number to look at; nothing may be concluded from it about the frame's memory.
    return ids_.is_taken(index) ? 1 + more_[index].load(relaxed) : 0;
  }

  Counts counts() const noexcept {
    const IdPool::Counts now = ids_.counts();
    return {.fresh = now.fresh, .free = now.free, .in_use = ids_.capacity() - now.fresh - now.free};
  }

 private:
  // Takes a reference away from those of the ids that have several, and returns these.
  std::uint32_t drop_more(IdBits ids) noexcept {
    // relaxed: see share.
    const std::uint32_t perhaps = shared_[ids.word].load(relaxed) & ids.mask;
    std::uint32_t kept = 0;
    for (std::uint32_t left = perhaps; left != 0; left &= left - 1) {
      const auto i = static_cast<std::uint32_t>(std::countr_zero(left));
      if (drop_more(ids.word * kIdsPerWord + i)) kept |= left & -left;
    }
    return kept;
  }

  // Takes one of several references away; false where there was one at most.
  bool drop_more(std::uint32_t index) noexcept {
    const auto more = more_[index];
    // acquire: what the holders before us did with the frame comes before its freeing, if that is
    // ours to do; release: what we did with it comes before its freeing by whoever does it.
    std::uint32_t seen = more.load(acquire);
    while (seen != 0) {
      if (more.compare_exchange_weak(seen, seen - 1, release, acquire)) return true;
    }
    return false;
  }

  IdPool ids_;
  AtomicArray<std::uint32_t> more_;    // references beyond the first; 0 while an id is free
  AtomicArray<std::uint32_t> shared_;  // a bit a frame: it was shared once, or several times
};

FramePool::FramePool(Pages capacity, SizeClass largest)
    : FramePool(capacity, largest, IdPool::kLendFrom) {}

FramePool::FramePool(Pages capacity, SizeClass largest, std::uint32_t lend_from) {
  if (largest.value > FrameId::kMaxClass) {
    throw InvalidArgument("frames of size class " + std::to_string(largest.value) +
                          " asked; the largest class is " + std::to_string(FrameId::kMaxClass) +
                          ": use smaller frames or larger pages");
  }
  if (capacity.value > FrameId::kMaxIndex + 1) {
    throw InvalidArgument("a pool of " + std::to_string(capacity.value) + " pages asked; at most " +
                          std::to_string(FrameId::kMaxIndex + 1) +
                          " have ids: use larger pages or several pools");
  }
  for (std::uint8_t c = 0; c <= largest.value; ++c) {
    const SizeClass size_class(c);
    const auto n_frames = capacity.value / pages_of(size_class).value;
    classes_[c] = std::make_unique<Class>(size_class, n_frames, lend_from);
  }
}

FramePool::~FramePool() = default;

bool FramePool::take(SizeClass c, std::span<FrameId> out) noexcept {
  Class* const pool = find(c);
  return pool != nullptr ? pool->take(out) : out.empty();
}

bool FramePool::take_recycled(SizeClass c, std::span<FrameId> out) noexcept {
  Class* const pool = find(c);
  return pool != nullptr ? pool->take_recycled(out) : out.empty();
}

bool FramePool::take_fresh(SizeClass c, std::span<FrameId> out) noexcept {
  Class* const pool = find(c);
  return pool != nullptr ? pool->take_fresh(out) : out.empty();
}

std::uint32_t FramePool::share(std::span<const FrameId> frames) noexcept {
  std::uint32_t n_refused = 0;
  for (const FrameId frame : frames) {
    Class* const pool = find(frame.size_class());
    if (pool == nullptr || !pool->share(frame.index())) ++n_refused;
  }
  return n_refused;
}

FramePool::Given FramePool::give(std::span<const FrameId> frames) noexcept {
  Given given;
  while (!frames.empty()) {
    const SizeClass c = frames.front().size_class();
    std::size_t n = 1;
    while (n < frames.size() && frames[n].size_class() == c) ++n;
    if (Class* const pool = find(c); pool != nullptr) {
      const IdPool::Given now = pool->give(frames.first(n));
      given.freed += now.freed;
      given.refused += now.refused;
    } else {
      given.refused += static_cast<std::uint32_t>(n);
    }
    frames = frames.subspan(n);
  }
  return given;
}

std::uint32_t FramePool::references(FrameId frame) const noexcept {
  const Class* const pool = find(frame.size_class());
  return pool != nullptr ? pool->references(frame.index()) : 0;
}

FramePool::Counts FramePool::counts(SizeClass c) const noexcept {
  const Class* const pool = find(c);
  return pool != nullptr ? pool->counts() : Counts{};
}

SizeClass FramePool::largest_class() const noexcept {
  std::uint8_t c = 0;
  while (find(SizeClass(static_cast<std::uint8_t>(c + 1))) != nullptr) ++c;
  return SizeClass(c);
}

}  // namespace kvspan
