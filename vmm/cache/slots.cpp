// The table of slots: which are free, what they keep mapped, and how much of that may stay.
#include <algorithm>

#include "cache/cache.hpp"
#include "core/errors.hpp"

namespace kvspan {

namespace {

// What is kept mapped costs nothing as long as so much of the pool is unused. From then on it is
// waste until it is used again, so it is held to a thousandth of what is mapped, or a few pages a
// lane where that is next to nothing. What a live sequence has left over from the slot's last one
// counts, but free slots give up theirs first: a live one is growing into its own.
constexpr std::uint64_t kAmpleOneIn = 2;
constexpr std::int64_t kKeepOneIn = 1000;
constexpr std::uint32_t kKeepPagesPerLane = 2;

// While memory is ample, a slot should also hold what a sequence will grow by: one in so many of
// the tokens that are expected at first.
constexpr std::int32_t kGrowthOneIn = 16;

// Of many slots that would do, so many are asked whether their work is done, and so many live ones
// how much of their surplus they have grown into meanwhile: a call's time does not depend on the
// number of slots.
constexpr int kMostLooks = 16, kMostRefreshes = 8;

}  // namespace

void Cache::check_open() const {
  if (is_closed_)
    throw ReleasedError("this cache was closed; make a new one with KVCache(pool, ...)");
}

SlotId Cache::best_free_slot(Tokens expected) const {
  // A good fit: the least that holds what is expected, else the most there is; settled slots first,
  // for the others have to be waited for.
  const Tokens growth(expected.value / kGrowthOneIn);
  if (growth > Tokens(0) && is_memory_ample()) expected += growth;
  expected = std::min(expected, space_->options().max_seq_len);
  Pages wanted{};
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    wanted += space_->pages_for(lane, expected);
  }
  std::optional<SlotId> best, first;
  int n_looks = 0;
  const auto look = [&](SlotId id) {
    if (!first) first = id;
    if (is_settled(id)) best = id;
    return best || ++n_looks == kMostLooks;
  };
  lists_.ascending(wanted, [&](SlotId id) { return slot(id).backed >= wanted && look(id); });
  if (!best && n_looks < kMostLooks) {
    lists_.descending(wanted, [&](SlotId id) { return slot(id).backed < wanted && look(id); });
  }
  if (!first) throw_no_slot(1);
  return best.value_or(*first);
}

SlotId Cache::emptiest_free_slot() const {
  std::optional<SlotId> emptiest;
  lists_.ascending(Pages(0), [&](SlotId id) {
    emptiest = id;
    return true;
  });
  if (!emptiest) throw_no_slot(1);
  return *emptiest;
}

SlotId Cache::adjacent_free_slots(std::int32_t n) const {
  std::int32_t run = 0;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    run = slots_[i].is_free() ? run + 1 : 0;
    if (run == n) return SlotId(static_cast<std::int32_t>(i) - n + 1);
  }
  throw_no_slot(n);
}

void Cache::throw_no_slot(std::int32_t n) const {
  const auto free = std::ranges::count_if(slots_, &Slot::is_free);
  throw CapacityError(
      (n == 1 ? std::string("no free slot") : "no " + std::to_string(n) + " adjacent free slots") +
      ": " + std::to_string(free) + " of max_seqs = " + std::to_string(slots_.size()) +
      " are free; release sequences or make the cache with more max_seqs");
}

std::shared_ptr<SequenceState> Cache::occupy(SlotId id) {
  auto state = std::make_shared<SequenceState>();
  state->slot = id;
  state->claim.store(Claim::used, std::memory_order_relaxed);  // until it is prepared
  state->table.lock();                                         // likewise
  slot(id).live = state;
  list(id);
  return state;
}

void Cache::prepare(SequenceState& state, Stream stream) {
  const SlotId id = state.slot;
  try {
    if (!is_settled(id)) state.predecessor = slot(id).fence;
    follow(state, stream);
    if (space_->options().scrub == Scrub::reuse) {
      Backend& backend = store_->backend();
      for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
        const Span& span = space_->span(id, lane);
        for (Pages page{}; page < span.end(); ++page) {
          if (!span[page].is_backed() || space_->is_shared(span, page)) continue;
          space_->account().add(Call::fill, 1);
          backend.fill(span.address_of(page), 0, space_->page_size(), stream);
        }
      }
    }
    update_capacity(state);
  } catch (...) {
    state.unclaim(Claim::released);
    vacate(state, slot(id).fence);  // which may not be passed yet
    state.table.unlock();
    throw;
  }
  state.table.unlock();
  state.unclaim();
}

void Cache::vacate(SequenceState& state, Fence fence) noexcept {
  const std::scoped_lock lock(mutex_);
  if (is_closed_) return;
  Slot& s = slot(state.slot);
  s.live.reset();
  s.fence = fence;
  update_mapped(state.slot);
  // A leased slot is its batch's: nobody else looks into it, so nothing may stay there.
  if (s.is_leased && !s.is_retired) drop_tail(state.slot, Tokens(0));
  limit_kept();
}

bool Cache::is_settled(SlotId id) const { return store_->backend().is_passed(slot(id).fence); }

void Cache::settle(SlotId id) {
  if (is_settled(id)) return;
  space_->account().add(Call::wait_fence, 1);
  store_->backend().wait(slot(id).fence);
}

Fence Cache::fence_behind(SlotId id, Stream stream) {
  Backend& backend = store_->backend();
  if (!is_settled(id)) {
    space_->account().add(Call::order_after, 1);
    backend.order_after(stream, slot(id).fence);
  }
  space_->account().add(Call::record_fence, 1);
  return backend.record_fence(stream);
}

bool Cache::fence_again(SequenceState& state) noexcept {
  try {
    slot(state.slot).fence = fence_behind(state.slot, state.stream);
    return true;
  } catch (const Error&) {
    return false;
  }
}

void Cache::follow(SequenceState& state, Stream stream) {
  state.stream = stream;
  if (state.predecessor.id == 0) return;
  if (store_->backend().is_passed(state.predecessor)) {
    state.predecessor = {};
    return;
  }
  space_->account().add(Call::order_after, 1);
  store_->backend().order_after(stream, state.predecessor);
}

void Cache::update_mapped(SlotId id) {
  const Pages now = space_->backed_pages(id);
  const auto change = std::int64_t{now.value} - std::int64_t{slot(id).backed.value};
  slot(id).backed = now;
  slot(id).is_retired = space_->is_broken(id);
  list(id);
  mapped_pages_.fetch_add(change, std::memory_order_relaxed);
}

void Cache::list(SlotId id) noexcept {
  // What a live sequence keeps is counted as it is now, and shrinks unnoticed while it decodes into
  // it: `kept_` is at most a little too large, until limit_kept or the mapper looks again.
  Slot& s = slot(id);
  const Pages planned = s.live && !s.is_retired ? planned_pages(*s.live) : Pages(0);
  kept_ -= s.kept;
  s.kept = s.is_retired || s.backed < planned ? Pages(0) : s.backed - planned;
  kept_ += s.kept;
  if (s.is_free()) {
    lists_.put_free(id, s.backed);
  } else if (s.live && s.kept > Pages(0)) {
    lists_.put_surplus(id);
  } else {
    lists_.remove(id);
  }
}

bool Cache::is_memory_ample() const {
  if (keep_) return false;
  const FrameStore::Counts counts = store_->counts();
  return (counts.capacity - counts.in_use).value >= counts.capacity.value / kAmpleOneIn;
}

Pages Cache::keep_limit() const {
  if (keep_) {
    return Pages(static_cast<std::uint32_t>(
        std::min<std::uint64_t>(keep_->value / space_->page_size().value, UINT32_MAX)));
  }
  if (is_memory_ample()) return Pages(UINT32_MAX);
  const auto share = mapped_pages_.load(std::memory_order_relaxed) / kKeepOneIn;
  return std::max(Pages(static_cast<std::uint32_t>(share)),
                  Pages(static_cast<std::uint32_t>(space_->n_lanes()) * kKeepPagesPerLane));
}

void Cache::limit_kept() noexcept {
  if (store_->background().is_running()) {
    store_->background().wake();  // the mapper's work
  } else {
    while (drop_excess(UINT32_MAX).unmapped > Pages(0)) {
    }
  }
}

// Unmaps what is kept over the limit, of one slot, at most `n_frames` of each lane's (or one).
// Returns what that was.
Cache::Dropped Cache::drop_excess(std::uint32_t n_frames) noexcept {
  for (int i = 0; i < kMostRefreshes && kept_ > keep_limit(); ++i) {
    const std::optional<SlotId> live = lists_.first_surplus();
    if (!live) break;
    lists_.remove(*live);
    list(*live);  // at the end, if at all
  }
  const Pages limit = keep_limit();
  if (kept_ <= limit) return {};
  return drop_kept(kept_ - limit, n_frames, false);
}

// Unmaps about `wanted` pages of one slot: of the free one that keeps most, and from its end, for
// every sequence needs the pages at the front; else what a live one has left over.
Cache::Dropped Cache::drop_kept(Pages wanted, std::uint32_t n_frames, bool waits) noexcept {
  std::optional<SlotId> fullest;
  int n_looks = 0;
  lists_.descending(Pages(UINT32_MAX), [&](SlotId id) {
    if (waits || is_settled(id)) fullest = id;
    return fullest || ++n_looks == kMostLooks;
  });
  if (fullest) {
    const Pages has = slot(*fullest).backed;
    const Tokens keep = has > wanted ? tokens_in(has - wanted) : Tokens(0);
    Pages freed = drop_tail(*fullest, std::max(keep, tokens_before_last(*fullest, n_frames)));
    // Where a frame is more than what is wanted, it goes all the same.
    if (slot(*fullest).backed == has && !slot(*fullest).is_retired) {
      freed = drop_tail(*fullest, tokens_before_last(*fullest, 1));
    }
    return {*fullest, has - slot(*fullest).backed, freed};
  }
  for (int i = 0; i < kMostRefreshes; ++i) {
    const std::optional<SlotId> live = lists_.first_surplus();
    if (!live) break;
    lists_.remove(*live);
    const Pages dropped = drop_surplus(*live, planned_tokens(*slot(*live).live), n_frames, waits);
    if (dropped > Pages(0)) return {*live, dropped, dropped};
    list(*live);
  }
  return {};
}

// Of a live sequence: unmaps what lies behind `keep` tokens, at most `n_frames` of each lane's, if
// nobody is inside a call on it.
Pages Cache::drop_surplus(SlotId id, Tokens keep, std::uint32_t n_frames, bool waits) noexcept {
  // Kernels may be reading a surplus that lies in a window, whatever the last fence says.
  if (!waits && (space_->has_windows() || !is_settled(id))) return Pages(0);
  SequenceState& state = *slot(id).live;
  if (!state.try_claim(Claim::reclaimed)) return Pages(0);
  Pages dropped{};
  const std::unique_lock table(state.table, std::try_to_lock);
  if (table && (!space_->has_windows() || fence_again(state))) {
    dropped = drop_tail(id, std::max(keep, tokens_before_last(id, n_frames)));
    update_capacity(state);
    note_ahead(state);
    state.is_lost = space_->is_broken(id);
  }
  state.unclaim(state.is_lost ? Claim::lost : Claim::idle);
  return dropped;
}

// How many tokens a slot holds without the last frames of each lane, but for one lane without at
// least one of them.
Tokens Cache::tokens_before_last(SlotId id, std::uint32_t n_frames) const {
  Tokens tokens{};
  const std::uint64_t n_each = std::max<std::uint64_t>(n_frames / space_->n_lanes(), 1);
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& span = space_->span(id, lane);
    Pages page = span.end();
    for (std::uint64_t i = 0; i < n_each && page > Pages(0); ++i) {
      page = span.widened({page - Pages(1), page}).first;
    }
    tokens = std::max(tokens, space_->whole_tokens(lane, page) - space_->options().overread);
  }
  return tokens;
}

Pages Cache::drop_tail(SlotId id, Tokens keep) noexcept {
  Pages before = slot(id).backed;
  try {
    settle(id);
    drop_shared(id, keep);  // not counted: others hold that memory
    before = slot(id).backed;
    Edit edit = space_->edit({});
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      Span& span = space_->span(id, lane);
      edit.drop(span, {space_->pages_with_overread(lane, keep), span.end()});
    }
    commit(edit);
  } catch (const std::exception&) {
    // Not unmapped is still mapped: nothing is lost but the memory that somebody hoped for.
  }
  update_mapped(id);
  return before - slot(id).backed;
}

Tokens Cache::tokens_in(Pages pages) const {
  // Rounding up to whole pages in every lane must not exceed `pages`.
  const auto spare = static_cast<std::uint32_t>(space_->n_lanes() - 1);
  if (pages.value <= spare) return Tokens(0);
  Bytes token_bytes{};
  for (const Lane& lane : space_->layout().lanes()) token_bytes += lane.token_bytes;
  const std::uint64_t bytes = (pages.value - spare) * space_->page_size().value;
  return Tokens(static_cast<std::int64_t>(bytes / token_bytes.value));
}

Pages Cache::needed_pages(const SequenceState& state) const {
  return pages_at(state, state.tokens());
}

Pages Cache::planned_pages(const SequenceState& state) const {
  return pages_at(state, planned_tokens(state));
}

Tokens Cache::planned_tokens(const SequenceState& state) const {
  const Tokens ahead(state.mapped_ahead.load(std::memory_order_relaxed));
  const Tokens announced(state.announced.load(std::memory_order_relaxed));
  return std::max({state.tokens(), ahead, announced});
}

Pages Cache::pages_at(const SequenceState& state, Tokens length) const {
  Pages pages{};
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    pages += space_->pages_with_overread(lane, length);
  }
  return pages - Pages(state.dropped_pages.load(std::memory_order_relaxed));
}

void Cache::note_ahead(SequenceState& state) {
  state.mapped_ahead.store(state.capacity.load(std::memory_order_relaxed),
                           std::memory_order_relaxed);
  list(state.slot);
}

}  // namespace kvspan
