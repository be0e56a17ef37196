#include "pool/id_pool.hpp"

#include <algorithm>
#include <atomic>
#include <bit>

namespace kvspan {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acquire = std::memory_order_acquire;
constexpr std::memory_order release = std::memory_order_release;

// How often a taker lets others run before it is refused although a word is on the way. They have
// a few instructions to go, so this is for threads that were stopped there.
constexpr int kPatience = 1000;

}  // namespace

IdPool::IdPool(SizeClass c, std::uint32_t capacity, std::uint32_t lend_from)
    : class_(c), capacity_(capacity), lend_from_(lend_from), tree_(capacity) {}

bool IdPool::take_elsewhere(std::span<FrameId> out, std::uint32_t limit) noexcept {
  return refill(out) || take_admitted(out, limit);
}

// Takes from a word that is lent to this thread from then on, in exchange for the one it had. False
// when ids are few, or no word nearby has as many side by side, or another thread came between.
bool IdPool::refill(std::span<FrameId> out) noexcept {
  if (out.empty() || out.size() > kIdsPerWord) return false;
  const auto wanted = static_cast<std::uint32_t>(out.size());
  // relaxed: only a guess, which the exchange below checks.
  std::uint64_t seen = admit_.load(relaxed);
  Admission now = Admission::unpacked(seen);
  if (now.free < lend_from_) return false;
  Magazine& mine = magazines_[thread_number()];
  const std::optional<IdBits> found = tree_.find(begin_search(now.bump), wanted);
  if (!found) return false;

  const auto n_ids = static_cast<std::uint32_t>(std::popcount(found->mask));
  do {
    now = Admission::unpacked(seen);
    if (now.free < n_ids || now.free < lend_from_ || now.n_lent == Admission::kMaxLent) {
      return false;
    }
    // relaxed: whose memory these ids are is settled where the word is lent. From here on they are
    // ours, to lend and to take.
  } while (!admit_.compare_exchange_weak(
      seen, Admission{now.bump, now.free - n_ids, now.n_lent + 1}.packed(), relaxed, relaxed));
  const std::uint32_t mask = pick(found->mask, wanted);
  if (!tree_.lend(*found, mask)) {
    // relaxed: nothing has happened. What givers released with these counts stays so, since every
    // change of `admit` is an exchange.
    admit_.fetch_add(n_ids - Admission::kOneLent, relaxed);
    return false;
  }
  // relaxed: the exchange hands over the duty to recall, and nothing else. No word is recalled
  // before it was lent, since `lend` ends with an acquire of what it has written.
  recall(mine.word.exchange(found->word, relaxed));
  mine.cursor.store(found->word, relaxed);
  write({found->word, mask}, out);
  return true;
}

// What an exchange of a magazine's word has returned.
void IdPool::recall(std::uint32_t word) noexcept {
  if (word == kNone) return;
  const std::uint32_t n_ids = tree_.recall(word);
  // release: the word is open to all first, so that no taker is admitted to ids it cannot find.
  admit_.fetch_add(n_ids - Admission::kOneLent, release);
}

void IdPool::recall_all() noexcept {
  // An exchange sees the last value, which a load need not. relaxed: see refill.
  for (Magazine& magazine : magazines_) recall(magazine.word.exchange(kNone, relaxed));
}

bool IdPool::take_admitted(std::span<FrameId> out, std::uint32_t limit) noexcept {
  if (out.size() > capacity_) return false;
  const auto wanted = static_cast<std::uint32_t>(out.size());
  // relaxed: only a guess, which the exchanges below check.
  std::uint64_t seen = admit_.load(relaxed);
  bool is_confirmed = false, has_recalled = false;
  for (int n_waits = 0;;) {
    const Admission now = Admission::unpacked(seen);
    const std::uint32_t n_recycled = std::min(wanted, now.free), n_fresh = wanted - n_recycled;
    const bool is_enough = n_fresh == 0 || (now.bump < limit && n_fresh <= limit - now.bump);
    if (is_enough && (n_fresh == 0 || now.n_lent == 0 || has_recalled)) {
      // acquire: see the bits that givers set before they added to `free`.
      const Admission then{now.bump + n_fresh, now.free - n_recycled, now.n_lent};
      is_confirmed = false;
      if (!admit_.compare_exchange_weak(seen, then.packed(), acquire, relaxed)) continue;
      if (n_recycled != 0) collect(out.first(n_recycled), now.bump);
      for (std::uint32_t i = 0; i < n_fresh; ++i) {
        out[n_recycled + i] = FrameId(class_, now.bump + i);
      }
      return true;
    }
    if (now.n_lent != 0 && n_waits < kPatience) {
      if (has_recalled) {
        let_others_run();
        ++n_waits;
      }
      recall_all();
      has_recalled = true;
    } else if (is_confirmed) {
      return false;
    }
    // A load may see an old value, and there may be enough by now; an exchange sees the last one.
    // relaxed: a refusal hands nothing over.
    seen = admit_.fetch_add(0, relaxed);
    is_confirmed = true;
  }
}

bool IdPool::take_fresh(std::span<FrameId> out) noexcept {
  if (out.size() > capacity_) return false;
  const auto wanted = static_cast<std::uint32_t>(out.size());
  // fetch_add, as above: a refusal needs the last value.
  std::uint64_t seen = admit_.fetch_add(0, relaxed);
  Admission now;
  do {
    now = Admission::unpacked(seen);
    if (wanted > capacity_ - now.bump) return false;
    // relaxed: nobody had these ids before.
  } while (!admit_.compare_exchange_weak(
      seen, Admission{now.bump + wanted, now.free, now.n_lent}.packed(), relaxed, relaxed));
  for (std::uint32_t i = 0; i < wanted; ++i) out[i] = FrameId(class_, now.bump + i);
  return true;
}

// Where this thread looks for ids first. Each starts in another part of the tree, so that threads
// do not take turns on one word.
std::uint32_t IdPool::begin_search(std::uint32_t bump) noexcept {
  const std::uint32_t number = thread_number();
  const std::uint32_t n_words = (bump - 1) / kIdsPerWord + 1;
  // relaxed, wherever a cursor is used: a place to begin, any value will do.
  const std::uint32_t cursor = magazines_[number].cursor.load(relaxed);
  if (cursor < n_words) return cursor;
  return static_cast<std::uint32_t>(std::uint64_t{number} * n_words / kThreadNumbers);
}

// Fills `out` with ids from the tree, which this thread is owed. `bump` is as it was at admission.
void IdPool::collect(std::span<FrameId> out, std::uint32_t bump) noexcept {
  const std::uint32_t begin = begin_search(bump);
  std::uint32_t n_words = (bump - 1) / kIdsPerWord + 1;
  std::uint32_t word = begin;
  while (!out.empty()) {
    const auto missing = static_cast<std::uint32_t>(out.size());
    IdBits ids = tree_.claim(word, missing);
    if (ids.mask == 0) ids = tree_.scan(n_words, missing);
    if (ids.mask == 0) {
      // Others came first at every word. What is owed may by now be an id that was fresh before.
      n_words = (admission().bump - 1) / kIdsPerWord + 1;
      continue;
    }
    word = ids.word;
    out = write(ids, out);
  }
  if (word != begin) magazines_[thread_number()].cursor.store(word, relaxed);
}

IdPool::Counts IdPool::counts() const noexcept {
  const Admission now = admission();
  Counts counts{capacity_ - now.bump, now.free};
  if (now.n_lent != 0) {
    for (const Magazine& magazine : magazines_) {
      // relaxed: of some moment.
      const std::uint32_t word = magazine.word.load(relaxed);
      if (word != kNone) counts.free += tree_.n_lent(word);
    }
  }
  counts.free = std::min(counts.free, now.bump);
  return counts;
}

}  // namespace kvspan
