// Why no bit is hidden for ever. A thread that adds writes the leaf, then reads its mark, and sets
// the mark if it is clear. A thread that empties a leaf clears the mark, then reads the leaf, and
// sets the mark again if the leaf is not empty. Each writes one word and then reads the other's, so
// at least one of the two has to see the other's write: this is store buffering, which acquire and
// release do not forbid and sequential consistency does. Therefore these writes and reads are all
// seq_cst. The same holds one level up, between marks and regions. (Model checkers found the hidden
// bit at once when the orders were acq_rel.) Only setting a region's bit is relaxed: nothing is
// read after it, and who adds reads the region after its mark in any case. A word that is lent
// counts as empty here: lending it is emptying it, and who recalls it adds.
#include "pool/bitmap_tree.hpp"

#include <algorithm>
#include <atomic>
#include <bit>

namespace kvspan {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acquire = std::memory_order_acquire;
constexpr std::memory_order seq_cst = std::memory_order_seq_cst;

// Words with free ids that a claim compares before it takes the best of them.
constexpr int kProbes = 8;
// Marked words that may turn out empty before a claim gives up on the hints.
constexpr int kMaxStale = 64;
// Words that a claim may lose to other threads before it gives up.
constexpr int kMaxLost = 4;

constexpr std::uint64_t bit(std::uint32_t i) { return std::uint64_t{1} << (i & 63); }
constexpr std::uint64_t from_bit(std::uint32_t i) { return ~std::uint64_t{0} << (i & 63); }
constexpr std::uint32_t words_for(std::uint32_t bits, std::uint32_t bits_per_word) {
  return bits / bits_per_word + (bits % bits_per_word != 0);
}

constexpr std::uint32_t lowest(std::uint64_t mask) {
  return static_cast<std::uint32_t>(std::countr_zero(mask));
}

}  // namespace

BitmapTree::BitmapTree(std::uint32_t n_ids)
    : n_words_(words_for(n_ids, kIdsPerWord)),
      n_mark_words_(words_for(n_words_, 64)),
      n_region_words_(words_for(n_mark_words_, 64)),
      leaves_(n_words_),
      marks_(n_mark_words_),
      regions_(n_region_words_) {}

IdBits BitmapTree::claim(std::uint32_t from, std::uint32_t want) noexcept {
  for (int lost = 0; lost < kMaxLost; ++lost) {
    const std::uint32_t word = best_word(from, want).word;
    if (word == kNoWord) break;
    if (const IdBits ids = claim_in(word, want); ids.mask != 0) return ids;
  }
  return {};
}

IdBits BitmapTree::scan(std::uint32_t end, std::uint32_t want) noexcept {
  for (std::uint32_t word = 0; word < end; ++word) {
    if (const IdBits ids = claim_in(word, want); ids.mask != 0) return ids;
  }
  return {};
}

IdBits BitmapTree::claim_in(std::uint32_t word, std::uint32_t want) noexcept {
  // relaxed: only a guess, which the exchange below checks.
  std::uint64_t seen = leaves_[word].load(relaxed);
  while (open_ids_of(seen) != 0) {
    const std::uint32_t mask = pick(ids_of(seen), want);
    // acquire: what the last owner did to these ids happened before we have them. What the givers
    // of the word's other ids released stays so, since every change of a word is an exchange.
    if (leaves_[word].compare_exchange_weak(seen, seen & ~std::uint64_t{mask}, acquire, relaxed)) {
      if (mask == ids_of(seen)) unmark(word);
      return {word, mask};
    }
  }
  return {};
}

std::optional<IdBits> BitmapTree::find(std::uint32_t from, std::uint32_t want) const noexcept {
  const Candidate best = best_word(from, want);
  if (best.run < want) return {};
  return IdBits{best.word, best.ids};
}

bool BitmapTree::lend(IdBits seen, std::uint32_t claimed) noexcept {
  std::uint64_t expected = seen.mask;
  // relaxed: what the last owners did to the ids is acquired by unmark, which loads the leaf.
  if (!leaves_[seen.word].compare_exchange_strong(expected, (seen.mask & ~claimed) | kLent, relaxed,
                                                  relaxed)) {
    return false;
  }
  unmark(seen.word);
  return true;
}

std::uint32_t BitmapTree::n_lent(std::uint32_t word) const noexcept {
  // relaxed: of some moment.
  const std::uint64_t leaf = leaves_[word].load(relaxed);
  return (leaf & kLent) != 0 ? static_cast<std::uint32_t>(std::popcount(ids_of(leaf))) : 0;
}

std::uint32_t BitmapTree::recall(std::uint32_t word) noexcept {
  // seq_cst: for the others this adds the ids, see the argument above.
  const std::uint32_t ids = ids_of(leaves_[word].fetch_and(~kLent, seq_cst));
  if (ids != 0) mark(word);
  return static_cast<std::uint32_t>(std::popcount(ids));
}

// The word, among the next few that have ids, with the longest run of up to `want`; kNoWord when
// the hints lead to none. All loads are relaxed: whatever they say, the claim itself decides.
BitmapTree::Candidate BitmapTree::best_word(std::uint32_t from, std::uint32_t want) const noexcept {
  const std::uint32_t enough = std::min(want, kIdsPerWord);
  Candidate best;
  std::uint32_t word = from;
  // The first word is tried unmarked, since it is where the caller was last; a round is over at the
  // first marked one.
  std::uint32_t round_start = kNoWord;
  for (int probes = 0, stale = 0; probes < kProbes && stale < kMaxStale;) {
    if (const std::uint32_t ids = open_ids_of(leaves_[word].load(relaxed)); ids != 0) {
      const std::uint32_t length = longest_run(ids, want).length;
      if (length > best.run) {
        best = {word, ids, length};
        if (length == enough) break;
      }
      if (round_start == kNoWord) round_start = word;
      ++probes;
    } else {
      ++stale;
    }
    word = next_marked(word + 1 == n_words_ ? 0 : word + 1);
    if (word == kNoWord || word == round_start) break;
  }
  return best;
}

// The first marked word from `from` on, going round at the end.
std::uint32_t BitmapTree::next_marked(std::uint32_t from) const noexcept {
  const std::uint32_t first = from / 64;
  if (const std::uint64_t here = marks_[first].load(relaxed) & from_bit(from); here != 0) {
    return first * 64 + lowest(here);
  }
  // Every region from the next word of marks on, and last once more the first region as a whole,
  // for the words of marks before `first`, and for those of `first` that lie before `from`.
  const std::uint32_t next = first + 1 == n_mark_words_ ? 0 : first + 1;
  std::uint32_t region = next / 64;
  std::uint64_t candidates = regions_[region].load(relaxed) & from_bit(next);
  for (std::uint32_t visited = 0; visited <= n_region_words_; ++visited) {
    for (; candidates != 0; candidates &= candidates - 1) {
      const std::uint32_t i = region * 64 + lowest(candidates);
      if (const std::uint64_t marked = marks_[i].load(relaxed); marked != 0) {
        return i * 64 + lowest(marked);
      }
    }
    region = region + 1 == n_region_words_ ? 0 : region + 1;
    candidates = regions_[region].load(relaxed);
  }
  return kNoWord;
}

// Called after adding to the leaf. Orders: see the top of this file. Loads come first because
// a mark is nearly always set already, and reading one leaves its cache line shared.
void BitmapTree::mark(std::uint32_t word) noexcept {
  const std::uint32_t i = word / 64, region = i / 64;
  if ((marks_[i].load(seq_cst) & bit(word)) == 0) marks_[i].fetch_or(bit(word), seq_cst);
  if ((regions_[region].load(seq_cst) & bit(i)) == 0) regions_[region].fetch_or(bit(i), relaxed);
}

// Called after the leaf was emptied, or lent. Orders: see the top of this file.
void BitmapTree::unmark(std::uint32_t word) noexcept {
  const std::uint32_t i = word / 64, region = i / 64;
  const std::uint64_t left = marks_[i].fetch_and(~bit(word), seq_cst) & ~bit(word);
  if (open_ids_of(leaves_[word].load(seq_cst)) != 0) {
    mark(word);
  } else if (left == 0) {
    regions_[region].fetch_and(~bit(i), seq_cst);
    if (marks_[i].load(seq_cst) != 0) regions_[region].fetch_or(bit(i), relaxed);
  }
}

}  // namespace kvspan
