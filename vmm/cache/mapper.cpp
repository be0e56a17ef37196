// The mapper's policy: which pages are mapped before they are needed. It runs on the pool's
// background thread (span/background.hpp), beside the steps of the sequences it works for.
//
// A sequence that has room for fewer than `kLookahead` more tokens gets its next page, or, when it
// is long, its next stride of pages. Only pages that nobody has touched yet are mapped, so no work
// on the device can be in the way; nothing is taken from others for it; what does not work out is
// left to the call that needs it, which also reports it.
#include <algorithm>
#include <functional>

#include "cache/cache.hpp"

namespace kvspan {

namespace {

// Decoding makes a token in some 5 to 30 ms, a page for each of 256 sequences takes some 40 ms, the
// pauses included: enough, and half a page of Llama-3-8B's (16 tokens), which is the waste that it
// costs.
constexpr Tokens kLookahead{8};

// So many slots are looked at in one go: whoever begins or releases a sequence waits meanwhile.
constexpr std::size_t kSlotsAtOnce = 1024;

// Relaxed: a first look, which map_next repeats under the lock.
std::int32_t room_of(const SequenceState& state) {
  return state.capacity.load(std::memory_order_relaxed) -
         state.length.load(std::memory_order_relaxed);
}

}  // namespace

WorkDone Cache::work_ahead() noexcept {
  WorkDone done;
  try {
    done.is_idle = growing_.empty() && !find_growing();
  } catch (const std::bad_alloc&) {
    return done;
  }
  while (!growing_.empty()) {
    const std::shared_ptr<SequenceState> state = std::move(growing_.back());
    growing_.pop_back();
    done.n_frames += map_next(*state) ? 1 : 0;
    // The others can wait for a moment, unless their next token has no room.
    if (done.n_frames > 0 && !growing_.empty() && room_of(*growing_.back()) > 0) break;
  }
  done.has_more = !growing_.empty();
  return done;
}

// Returns whether there are sequences at all.
bool Cache::find_growing() {
  bool is_any = false;
  for (std::size_t i = 0; i < slots_.size();) {
    const std::size_t end = std::min(slots_.size(), i + kSlotsAtOnce);
    const std::scoped_lock lock(mutex_);
    for (; i < end; ++i) {
      const Slot& s = slots_[i];
      if (!s.live) continue;
      is_any = true;
      if (s.kept > Pages(0)) list(SlotId(static_cast<std::int32_t>(i)));  // it may need them by now
      // An empty sequence is about to be given a prompt, and nobody knows of what length.
      if (s.live->tokens() > Tokens(0) && room_of(*s.live) < kLookahead.value) {
        growing_.push_back(s.live);
      }
    }
  }
  std::ranges::stable_sort(growing_, std::greater{}, [](const auto& s) { return room_of(*s); });
  return is_any;
}

bool Cache::map_next(SequenceState& state) noexcept {
  const std::unique_lock table(state.table, std::try_to_lock);
  if (!table) return false;  // somebody is growing or shrinking it just now
  const Claim claim = state.claim.load(std::memory_order_acquire);
  if (claim != Claim::idle && claim != Claim::used) return false;
  const Tokens longest = space_->options().max_seq_len;
  const Tokens capacity(state.capacity.load(std::memory_order_relaxed));
  if (capacity >= longest || capacity - state.tokens() >= kLookahead) return false;

  try {
    const Stream stream = store_->backend().own_stream();
    Edit edit(*store_, space_->account(), stream, Effort::spare);
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      const Span& span = space_->span(state.slot, lane);
      const PageRange range{
          space_->page_of(lane, capacity),
          stride_end(lane, span, space_->pages_with_overread(lane, capacity + Tokens(1)))};
      for (Pages page = range.first; page < range.last; ++page) {
        // That would have to be unmapped first, which has to wait for work on the device.
        if (space_->is_in_the_way(span, page)) return false;
      }
      space_->back(edit, state.slot, lane, range);
    }
    if (edit.is_empty()) return false;
    commit(edit);
    if (edit.has_queued_work()) {
      store_->backend().wait(store_->backend().record_fence(stream));
    }
    const std::scoped_lock lock(mutex_);
    update_mapped(state.slot);
    update_capacity(state);
    note_ahead(state);
    return true;
  } catch (const std::exception&) {
    // A span that broke on the way is found by the next call that claims the sequence.
    if (space_->is_broken(state.slot)) state.is_lost = true;
    return false;
  }
}

}  // namespace kvspan
