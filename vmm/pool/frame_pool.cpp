// Who owns an id at a moment is settled by one word: while its count is above 0, those who hold the
// references; from the exchange that makes it 0 until the id stands in the tree, the thread that
// made that exchange, and no other, since 0 can be neither shared nor given; in the tree, nobody.
#include "pool/frame_pool.hpp"

#include <limits>
#include <string>

#include "core/errors.hpp"
#include "pool/atomics.hpp"
#include "pool/id_pool.hpp"

namespace kvspan {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acq_rel = std::memory_order_acq_rel;

constexpr std::uint32_t kMaxReferences = std::numeric_limits<std::uint32_t>::max();

}  // namespace

class FramePool::Class {
 public:
  Class(SizeClass c, std::uint32_t capacity) : ids_(c, capacity), references_(capacity) {}

  bool take(std::span<FrameId> out) noexcept { return ids_.take(out) && hand_out(out); }
  bool take_fresh(std::span<FrameId> out) noexcept { return ids_.take_fresh(out) && hand_out(out); }

  bool share(std::uint32_t index) noexcept {
    if (index >= ids_.capacity()) return false;
    const auto count = references_[index];
    std::uint32_t seen = count.load(relaxed);
    do {
      if (seen == 0 || seen == kMaxReferences) return false;
      // relaxed: a new reference comes from one that is there, whose holder passes it on.
    } while (!count.compare_exchange_weak(seen, seen + 1, relaxed, relaxed));
    return true;
  }

  // All frames are of this class.
  void give(std::span<const FrameId> frames, Given& given) noexcept {
    IdPool::Return freed(ids_);
    for (const FrameId frame : frames) {
      const std::uint32_t index = frame.index();
      switch (drop(index)) {
        case 0:
          freed.add(index);
          ++given.freed;
          break;
        case kRefused:
          ++given.refused;
          break;
        default:
          break;
      }
    }
  }

  std::uint32_t references(std::uint32_t index) const noexcept {
    // relaxed: a number to look at; nothing may be concluded from it about the frame's memory.
    return index < ids_.capacity() ? references_[index].load(relaxed) : 0;
  }

  Counts counts() const noexcept {
    const IdPool::Admission now = ids_.admission();
    return {.fresh = ids_.capacity() - now.bump, .free = now.free, .in_use = now.bump - now.free};
  }

 private:
  static constexpr std::uint32_t kRefused = kMaxReferences;

  bool hand_out(std::span<const FrameId> taken) noexcept {
    // relaxed: the ids are ours alone, and who gets to know of them does so through us.
    for (const FrameId frame : taken) references_[frame.index()].store(1, relaxed);
    return true;
  }

  // Takes one reference away and returns how many are left, or kRefused when there was none.
  std::uint32_t drop(std::uint32_t index) noexcept {
    if (index >= ids_.capacity()) return kRefused;
    const auto count = references_[index];
    std::uint32_t seen = count.load(relaxed);
    do {
      if (seen == 0) return kRefused;
      // release: what we did with the frame comes before its freeing, whoever frees it; acquire: if
      // that is us, so does what the holders before us did.
    } while (!count.compare_exchange_weak(seen, seen - 1, acq_rel, relaxed));
    return seen - 1;
  }

  IdPool ids_;
  AtomicArray<std::uint32_t> references_;
};

FramePool::FramePool(Pages capacity, SizeClass largest) {
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
  classes_.reserve(std::size_t{largest.value} + 1);
  for (std::uint8_t c = 0; c <= largest.value; ++c) {
    const SizeClass size_class(c);
    classes_.push_back(
        std::make_unique<Class>(size_class, capacity.value / pages_of(size_class).value));
  }
}

FramePool::~FramePool() = default;

bool FramePool::take(SizeClass c, std::span<FrameId> out) noexcept {
  Class* const pool = find(c);
  return pool != nullptr ? pool->take(out) : out.empty();
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
      pool->give(frames.first(n), given);
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
  return SizeClass(static_cast<std::uint8_t>(classes_.size() - 1));
}

const FramePool::Class* FramePool::find(SizeClass c) const noexcept {
  return c.value < classes_.size() ? classes_[c.value].get() : nullptr;
}

FramePool::Class* FramePool::find(SizeClass c) noexcept {
  return c.value < classes_.size() ? classes_[c.value].get() : nullptr;
}

}  // namespace kvspan
