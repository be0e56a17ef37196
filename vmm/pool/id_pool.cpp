#include "pool/id_pool.hpp"

#include <algorithm>
#include <atomic>
#include <bit>

namespace kvspan {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acquire = std::memory_order_acquire;
constexpr std::memory_order release = std::memory_order_release;
constexpr std::memory_order acq_rel = std::memory_order_acq_rel;

constexpr std::uint64_t pack(IdPool::Admission a) { return (std::uint64_t{a.bump} << 32) | a.free; }

constexpr IdPool::Admission unpack(std::uint64_t word) {
  return {static_cast<std::uint32_t>(word >> 32), static_cast<std::uint32_t>(word)};
}

// Spreads threads over cursors; it means nothing else, and no two pools meet in it.
std::uint32_t thread_number() noexcept {
  static std::atomic<std::uint32_t> n_threads{0};
  thread_local std::uint32_t number = 0;  // 0: none yet; a constant, so access needs no guard
  if (number == 0) number = n_threads.fetch_add(1, relaxed) + 1;
  return number;
}

}  // namespace

IdPool::IdPool(SizeClass c, std::uint32_t capacity)
    : class_(c), capacity_(capacity), tree_(capacity) {}

bool IdPool::take(std::span<FrameId> out) noexcept {
  if (out.size() > capacity_) return false;
  const auto wanted = static_cast<std::uint32_t>(out.size());
  std::uint32_t n_recycled = 0;
  const std::optional<Admission> now = admit([&](Admission a) -> std::optional<Admission> {
    n_recycled = std::min(wanted, a.free);
    const std::uint32_t n_fresh = wanted - n_recycled;
    if (n_fresh > capacity_ - a.bump) return {};
    return Admission{a.bump + n_fresh, a.free - n_recycled};
  });
  if (!now) return false;
  if (n_recycled != 0) collect(out.first(n_recycled), now->bump);
  for (std::uint32_t i = n_recycled; i < wanted; ++i) {
    out[i] = FrameId(class_, now->bump + (i - n_recycled));
  }
  return true;
}

bool IdPool::take_fresh(std::span<FrameId> out) noexcept {
  if (out.size() > capacity_) return false;
  const auto wanted = static_cast<std::uint32_t>(out.size());
  const std::optional<Admission> now = admit([&](Admission a) -> std::optional<Admission> {
    if (wanted > capacity_ - a.bump) return {};
    return Admission{a.bump + wanted, a.free};
  });
  if (!now) return false;
  for (std::uint32_t i = 0; i < wanted; ++i) out[i] = FrameId(class_, now->bump + i);
  return true;
}

// Puts `change` of the admission in its place, and returns what it was; nothing where `change` has
// nothing.
template <class Change>
std::optional<IdPool::Admission> IdPool::admit(const Change& change) noexcept {
  // relaxed: only a guess, which the exchanges below check.
  std::uint64_t seen = admit_.load(relaxed);
  for (;;) {
    const Admission now = unpack(seen);
    if (const std::optional<Admission> then = change(now)) {
      // acquire: see the bits that givers set before they added to `free`; release: whoever reads
      // the new bump knows of everything that came before it.
      if (admit_.compare_exchange_weak(seen, pack(*then), acq_rel, relaxed)) return now;
      continue;
    }
    // A load may see an old value, and there may be enough by now; an exchange sees the last one.
    // relaxed: a refusal hands nothing over.
    const std::uint64_t last = admit_.fetch_add(0, relaxed);
    if (last == seen) return {};
    seen = last;
  }
}

// Fills `out` with ids from the tree, which this thread is owed. `bump` is as it was at admission.
void IdPool::collect(std::span<FrameId> out, std::uint32_t bump) noexcept {
  const std::uint32_t slot = thread_number() % kCursors;
  Atomic<std::uint32_t>& cursor = cursors_[slot].word;
  // relaxed, here and below: a place to begin, any value will do.
  const std::uint32_t begin = cursor.load(relaxed);
  std::uint32_t n_words = (bump - 1) / 64 + 1;
  std::uint32_t word = begin;
  if (word >= n_words) {
    word = static_cast<std::uint32_t>(std::uint64_t{slot} * n_words / kCursors);
  }

  std::size_t n_found = 0;
  while (n_found < out.size()) {
    const auto missing = static_cast<std::uint32_t>(out.size() - n_found);
    IdBits ids = tree_.claim(word, missing);
    if (ids.mask == 0) ids = tree_.scan(n_words, missing);
    if (ids.mask == 0) {
      // Others came first at every word. What is owed may by now be an id that was fresh before.
      n_words = (admission().bump - 1) / 64 + 1;
      continue;
    }
    word = ids.word;
    for (; ids.mask != 0; ids.mask &= ids.mask - 1) {
      const auto low = static_cast<std::uint32_t>(std::countr_zero(ids.mask));
      out[n_found++] = FrameId(class_, word * 64 + low);
    }
  }
  if (word != begin) cursor.store(word, relaxed);
}

IdPool::Admission IdPool::admission() const noexcept {
  // acquire: who reads a count also sees what was done before it came about.
  return unpack(admit_.load(acquire));
}

IdPool::Return::Counts IdPool::Return::finish() noexcept {
  flush(0);
  // release: the bits come first, so that no taker is admitted to an id that it cannot find.
  if (counts_.n_added != 0) pool_.admit_.fetch_add(counts_.n_added, release);
  return counts_;
}

void IdPool::Return::flush(std::uint32_t next_word) noexcept {
  if (pending_.mask != 0) {
    const std::uint64_t refused = pool_.tree_.set(pending_);
    const auto n_refused = static_cast<std::uint32_t>(std::popcount(refused));
    counts_.n_refused += n_refused;
    counts_.n_added += static_cast<std::uint32_t>(std::popcount(pending_.mask)) - n_refused;
  }
  pending_ = {next_word, 0};
}

}  // namespace kvspan
