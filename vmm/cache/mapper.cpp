// The mapper's policy: which pages are mapped before they are needed, and which of those that
// nobody needs are unmapped. It runs on the pool's background thread (span/background.hpp), beside
// the steps of the sequences it works for.
//
// Mapping: a sequence gets the pages for which it will soon have tokens, as its pace tells
// (cache/pace.hpp): the next one of a decoding sequence, or the next stride of a long one, and a
// longer stride while memory is ample; the next piece of a prompt that was announced. Only pages
// that nobody has touched yet are mapped, so no work on the device can be in the way. For that it
// takes what is free, may be created, or is kept for nobody in particular; what does not work out
// is left to the call that needs it, which also reports it. When there is nothing to take, it
// pauses, longer each time.
//
// Unmapping: what free slots keep over the limit, when the work that used it is done, a few frames
// at a time, and only when nothing is left to map.
#include <algorithm>
#include <functional>

#include "cache/cache.hpp"

namespace kvspan {

namespace {

using namespace std::chrono_literals;

// How long it may take until a page is mapped: a look at all sequences and the pauses, and then all
// frames that will be needed soon, should it be at once: one for a sequence that is close to the
// end of its pages, some for a piece of a prompt. A driver takes some 0.1 ms for a frame (CUDA, 2
// to 128 MiB; a host a tenth).
constexpr auto kLead = 8ms;
constexpr auto kLeadPerFrame = 100us;
constexpr std::int32_t kClose = Pace::kAnyPace.value;
constexpr std::size_t kFramesPerPiece = 4;

// Between two attempts to find memory.
constexpr TimePoint::duration kFirstBackoff = 1ms, kLongestBackoff = 64ms;

// So many slots are looked at, and frames unmapped, in one go: whoever begins or releases a
// sequence waits meanwhile.
constexpr std::size_t kSlotsAtOnce = 1024;
constexpr std::uint32_t kFramesAtOnce = 8;

// Relaxed: a first look, which map_next repeats under the lock.
std::int32_t room_of(const SequenceState& state) {
  return state.capacity.load(std::memory_order_relaxed) -
         state.length.load(std::memory_order_relaxed);
}

}  // namespace

WorkDone Cache::work_ahead(TimePoint now) noexcept {
  WorkDone done;
  try {
    done.is_idle = growing_.empty() && !find_growing(now);
  } catch (const std::bad_alloc&) {
    return done;
  }
  while (!growing_.empty()) {
    const Growing next = std::move(growing_.back());
    growing_.pop_back();
    done.n_frames += map_next(next, now) ? 1 : 0;
    // The others can wait for a moment, unless their next token has no room.
    if (done.n_frames > 0 && !growing_.empty() && room_of(*growing_.back().state) > 0) break;
  }
  done.has_more = !growing_.empty();
  if (done.n_frames == 0 && unmap_kept(now)) {
    done.n_frames = 1;
    done.has_more = true;
  }
  return done;
}

// Returns whether there are sequences at all, or pages to be unmapped.
bool Cache::find_growing(TimePoint now) {
  std::size_t n_live = 0, n_frames = 0;
  std::uint64_t n_pages = 0;
  bool keeps_too_much = false;
  for (std::size_t i = 0; i < slots_.size();) {
    const std::size_t end = std::min(slots_.size(), i + kSlotsAtOnce);
    const std::scoped_lock lock(mutex_);
    for (; i < end; ++i) {
      const Slot& s = slots_[i];
      if (!s.live) continue;
      ++n_live;
      n_pages += s.backed.value;
      if (s.kept > Pages(0)) list(SlotId(static_cast<std::int32_t>(i)));  // it may need them by now
      const Tokens length = s.live->tokens();
      const Tokens expected(s.live->announced.load(std::memory_order_relaxed));
      n_frames += length < expected ? kFramesPerPiece : room_of(*s.live) < kClose ? 1 : 0;
      const Tokens ahead = s.live->pace.look(length, expected, now, lead_, prefill_);
      if (room_of(*s.live) < ahead.value && now >= mapping_resumes_) {
        growing_.push_back({s.live, length + ahead});
      }
    }
    keeps_too_much = kept_ > keep_limit();
  }
  lead_ = kLead + kLeadPerFrame * n_frames;
  const std::size_t n_lanes = std::max<std::size_t>(n_live, 1) * space_->n_lanes();
  mean_pages_.store(static_cast<std::uint32_t>(n_pages / n_lanes), std::memory_order_relaxed);
  std::ranges::stable_sort(growing_, std::greater{},
                           [](const Growing& g) { return room_of(*g.state); });
  return n_live > 0 || keeps_too_much;
}

bool Cache::map_next(const Growing& growing, TimePoint now) noexcept {
  SequenceState& state = *growing.state;
  const std::unique_lock table(state.table, std::try_to_lock);
  if (!table) return false;  // somebody is growing or shrinking it just now
  const Claim claim = state.claim.load(std::memory_order_acquire);
  if (claim != Claim::idle && claim != Claim::used) return false;
  const Tokens longest = space_->options().max_seq_len;
  const Tokens capacity(state.capacity.load(std::memory_order_relaxed));
  const Tokens until = std::min(growing.until, longest);
  if (capacity >= until) return false;
  MapperEvent event{.at = now, .slot = state.slot, .room = capacity - state.tokens()};

  try {
    const Stream stream = store_->backend().own_stream();
    Edit edit(*store_, space_->account(), stream, Effort::kept);
    const bool is_ample = is_memory_ample();
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      const Span& span = space_->span(state.slot, lane);
      const PageRange range{space_->page_of(lane, capacity),
                            stride_end(state, lane, until, is_ample)};
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
    backoff_ = {};
    const std::scoped_lock lock(mutex_);
    const Pages before = slot(state.slot).backed;
    update_mapped(state.slot);
    update_capacity(state);
    note_ahead(state);
    event.kind = MapperEvent::Kind::mapped;
    event.pages = slot(state.slot).backed - before;
    mapper_log_.note(event);
    return true;
  } catch (const OutOfMemory&) {
    event.kind = MapperEvent::Kind::starved;
    backoff_ = std::clamp(2 * backoff_, kFirstBackoff, kLongestBackoff);
    mapping_resumes_ = now + backoff_;
    growing_.clear();
  } catch (const std::exception&) {
    event.kind = MapperEvent::Kind::failed;
  }
  mapper_log_.note(event);
  // A span that broke on the way is found by the next call that claims the sequence.
  if (space_->is_broken(state.slot)) state.is_lost = true;
  return false;
}

bool Cache::unmap_kept(TimePoint now) noexcept {
  const std::scoped_lock lock(mutex_);
  if (is_closed_) return false;
  const Dropped dropped = drop_excess(kFramesAtOnce);
  if (dropped.unmapped == Pages(0)) return false;
  mapper_log_.note({now, MapperEvent::Kind::unmapped, dropped.slot, dropped.unmapped});
  return true;
}

}  // namespace kvspan
