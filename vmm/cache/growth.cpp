// How sequences grow and shrink, in terms of pages. The fast path, a sequence that stays within its
// capacity, is a comparison and a store; everything else is one Edit under the tables' locks.
#include <algorithm>
#include <bit>

#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

// More at once is a prompt: too many pages that are kept no longer to leave them to be noticed.
constexpr Tokens kFewTokens{16};

// Strides are of one in so many of a sequence's pages, or a little more: a driver takes a frame of
// any size for one, but what the last one leaves over is waste. While memory is ample, it is as
// good there as in what free slots keep.
constexpr std::uint32_t kStrideOneIn = 256, kAmpleStrideOneIn = 8;

}  // namespace

void Cache::extend(SequenceState& state, Tokens n, Stream stream) {
  if (n < Tokens(1)) {
    throw InvalidArgument("extend takes 1 token or more, not " + std::to_string(n.value));
  }
  const Tokens length = state.tokens();
  if (n > space_->options().max_seq_len - length) {
    throw CapacityError("a sequence of " + std::to_string(length.value) +
                        " tokens cannot grow by " + std::to_string(n.value) + ": max_seq_len is " +
                        std::to_string(space_->options().max_seq_len.value) +
                        "; truncate it or make the cache with a larger max_seq_len");
  }
  follow(state, stream);
  const Tokens grown = length + n;
  SequenceState* const states[] = {&state};
  const bool has_room = grown.value <= state.capacity.load(std::memory_order_acquire);
  if (!has_room) grow(states, n, stream);
  state.length.store(static_cast<std::int32_t>(grown.value), std::memory_order_relaxed);
  if (!has_room || n > kFewTokens) note_grown(states);
}

void Cache::note_grown(std::span<SequenceState* const> states) {
  const std::scoped_lock lock(mutex_);
  for (const SequenceState* state : states) {
    if (slot(state->slot).kept > Pages(0)) list(state->slot);
  }
}

void Cache::grow(std::span<SequenceState* const> states, Tokens n, Stream stream) {
  std::vector<SequenceState*> short_of_room;
  std::vector<std::unique_lock<TableLock>> tables;
  for (SequenceState* state : states) {
    if (state->tokens().value + n.value <= state->capacity.load(std::memory_order_acquire))
      continue;
    tables.emplace_back(state->table);  // which may have to wait for the mapper
    short_of_room.push_back(state);
  }
  // Room to spare is welcome, but not worth what somebody is expected to use.
  const bool may_spare = store_->largest_class() > SizeClass(0);
  if (!may_spare || !try_grow(short_of_room, n, stream, Effort::kept)) {
    try_grow(short_of_room, n, stream, Effort::all);
  }
  n_grown_late_.fetch_add(1, std::memory_order_relaxed);
  store_->background().wake();
}

bool Cache::try_grow(std::span<SequenceState* const> states, Tokens n, Stream stream,
                     Effort effort) {
  Edit edit(*store_, space_->account(), stream, effort);
  for (const SequenceState* state : states) {
    // Once more: the mapper may have come first.
    if (state->tokens().value + n.value > state->capacity.load(std::memory_order_relaxed)) {
      plan_growth(edit, *state, n, stream, effort);
    }
  }
  const auto is_any_lost = [&] {
    bool is_any = false;
    for (SequenceState* state : states) {
      state->is_lost = space_->is_broken(state->slot);
      is_any = is_any || state->is_lost;
    }
    return is_any;
  };
  try {
    commit(edit);
  } catch (const OutOfMemory&) {
    if (is_any_lost() || effort == Effort::all) throw;
    return false;
  } catch (...) {
    is_any_lost();
    throw;
  }
  const auto now = TimePoint::clock::now();
  const std::scoped_lock lock(mutex_);
  for (SequenceState* state : states) {
    const Pages before = slot(state->slot).backed;
    const auto room = state->capacity.load(std::memory_order_relaxed) - state->tokens().value;
    update_mapped(state->slot);
    update_capacity(*state);
    mapper_log_.note({now, MapperEvent::Kind::late, state->slot, slot(state->slot).backed - before,
                      Tokens(room)});
    if (effort == Effort::all) continue;
    note_ahead(*state);
    // What is left over may be taken back before it is ever used, but not under what fills it.
    if (!edit.has_queued_work()) continue;
    try {
      slot(state->slot).fence = fence_behind(state->slot, stream);
    } catch (const Error&) {
      store_->backend().finish();  // the pages are there: that no fence is to be had is no failure
    }
  }
  return true;
}

void Cache::plan_growth(Edit& edit, const SequenceState& state, Tokens n, Stream stream,
                        Effort effort) {
  const Tokens length = state.tokens();
  const bool is_ample = effort != Effort::all && is_memory_ample();
  bool has_waited = false;
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& span = space_->span(state.slot, lane);
    const PageRange range{space_->page_of(lane, length),
                          effort == Effort::all ? space_->pages_with_overread(lane, length + n)
                                                : stride_end(state, lane, length + n, is_ample)};
    space_->back(edit, state.slot, lane, range);
    bool is_in_the_way = false;
    for (Pages page = range.first; page < range.last; ++page) {
      is_in_the_way = is_in_the_way || space_->is_in_the_way(span, page);
    }
    if (!is_in_the_way) continue;
    // Zeros, or, after a truncate, a shared page: the next token must not be written where others
    // read. Work that still reads it here, under this address, comes first.
    if (!has_waited) {
      settle(state.slot);
      store_->backend().wait(store_->backend().record_fence(stream));
    }
    has_waited = true;
    const Bytes live = space_->byte_of(lane, length) - space_->page_size() * range.first.value;
    space_->own(edit, state.slot, lane, range, live);
  }
}

Pages Cache::stride_end(const SequenceState& state, std::size_t lane, Tokens until,
                        bool is_ample) const {
  const Pages end = space_->span(state.slot, lane).end();
  const Pages needed = space_->pages_with_overread(lane, until);
  if (needed <= end) return needed;
  const std::uint32_t largest = pages_of(store_->largest_class()).value;
  const Tokens longest = space_->options().max_seq_len;
  // To the next multiple of `stride` pages, counted from `origin`.
  const auto strides_of = [&](std::uint32_t stride, Pages origin, Tokens limit) {
    stride = std::min(stride, largest);
    const auto n = static_cast<std::uint32_t>(div_up((needed - origin).value, stride));
    return std::min(origin + Pages(n * stride), space_->pages_with_overread(lane, limit));
  };
  const Tokens announced(state.announced.load(std::memory_order_relaxed));
  if (is_ample && !state.is_branch) {
    const bool is_unannounced_prompt = until - std::max(state.tokens(), announced) > kFewTokens;
    if (is_unannounced_prompt) return needed;
    const Pages expected = space_->pages_with_overread(lane, std::max(until, announced));
    const std::uint32_t stride = std::bit_floor(expected.value / kAmpleStrideOneIn);
    // Counted from where the pages end, each is one frame.
    return strides_of(std::max(stride, 1u), end, longest);
  }
  const std::uint32_t stride_for_length = std::bit_floor(needed.value / kStrideOneIn);
  if (until < announced) {
    // Whole large frames: what this piece of the prompt leaves of them is for the next one.
    const std::uint32_t piece = std::max((needed - end).value, 4u);
    return strides_of(std::max(stride_for_length, std::bit_floor(piece) / 4), Pages(0), announced);
  }
  // A longer sequence grows in longer strides, each one frame: a call costs per frame, whatever its
  // size. Half a stride is unused on average: 1% of 48 pages, and 0.2% at most from 256 on. What
  // counts is the sum, so among longer sequences a short one may grow by two pages as well.
  // Strides end at multiples of themselves, so that frames of that size are all that is needed.
  constexpr std::uint32_t kTwoFrom = 48;
  const std::uint32_t mean = mean_pages_.load(std::memory_order_relaxed);
  const std::uint32_t least = std::max(needed.value, mean) < kTwoFrom ? 1u : 2u;
  return strides_of(std::max(stride_for_length, least), Pages(0), longest);
}

void Cache::commit(Edit& edit) {
  if (edit.is_empty()) return;
  edit.commit();
  shared_pages_.fetch_add(edit.shared_pages(), std::memory_order_relaxed);
}

void Cache::update_capacity(SequenceState& state) {
  // Up to the first page, from where the next token goes, that is missing or shared.
  const Tokens length = state.tokens();
  Tokens capacity = space_->options().max_seq_len;
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& span = space_->span(state.slot, lane);
    Pages page = space_->page_of(lane, length);
    while (page < span.end() && span[page].is_backed() && !space_->is_shared(span, page)) {
      page = span.frame_of(page).last;
    }
    if (page == span.size()) continue;  // everything, up to max_seq_len
    capacity = std::min(capacity, space_->whole_tokens(lane, page) - space_->options().overread);
  }
  state.capacity.store(static_cast<std::int32_t>(std::max(capacity, length).value),
                       std::memory_order_release);
}

void Cache::truncate(SequenceState& state, Tokens n, Stream stream) {
  const Tokens length = state.tokens();
  const Tokens dropped(state.dropped.load(std::memory_order_relaxed));
  if (n < Tokens(0) || n > length) {
    throw InvalidArgument("truncate takes a length between 0 and the present one, " +
                          std::to_string(length.value) + ", not " + std::to_string(n.value));
  }
  if (n < dropped) {
    throw InvalidArgument("cannot truncate to " + std::to_string(n.value) +
                          " tokens: positions before " + std::to_string(dropped.value) +
                          " were dropped; release the sequence and take a new one");
  }
  const std::scoped_lock table(state.table);
  const Fence fence = fence_behind(state.slot, stream);
  state.stream = stream;
  state.length.store(static_cast<std::int32_t>(n.value), std::memory_order_relaxed);
  state.mapped_ahead.store(0, std::memory_order_relaxed);  // from here on it is kept
  {
    const std::scoped_lock lock(mutex_);
    slot(state.slot).fence = fence;
    // Shared pages past the end are of no use to this sequence: it would have to copy them.
    if (is_settled(state.slot)) drop_shared(state.slot, n);
    // A surplus of its own stays, for after a rejected speculation it is needed soon: over the
    // limit, free slots give up theirs first.
    list(state.slot);
    limit_kept();
    const Pages limit = keep_limit();
    if (kept_ > limit && is_settled(state.slot)) {
      const Pages excess = kept_ - limit;
      const Pages stays = std::max(slot(state.slot).backed, needed_pages(state) + excess) - excess;
      drop_tail(state.slot, std::max(n, tokens_in(stays)));
    }
    state.is_lost = space_->is_broken(state.slot);
    update_capacity(state);
  }
}

void Cache::drop_shared(SlotId id, Tokens keep) noexcept {
  try {
    Edit edit = space_->edit({});
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      Span& span = space_->span(id, lane);
      const auto is_shared = [&](Pages page) {
        return page < span.end() && span[page].is_backed() && space_->is_shared(span, page);
      };
      for (Pages page = space_->pages_with_overread(lane, keep); page < span.end(); ++page) {
        if (!is_shared(page)) continue;
        Pages last = page;
        while (is_shared(last)) ++last;
        edit.drop(span, {page, last});
        page = last;
      }
    }
    commit(edit);
  } catch (const std::exception&) {
    // They stay mapped, and are told from pages of the sequence's own by their reference count.
  }
  update_mapped(id);
}

void Cache::drop_before(SequenceState& state, Tokens position, Stream stream) {
  const Tokens length = state.tokens();
  if (!space_->layout().has_window()) {
    throw InvalidArgument(
        "no layer of this cache has a sliding window, so no position may be dropped; give "
        "LayerSpec(..., window=n) to the layers that have one");
  }
  Tokens limit = length;
  for (const Lane& lane : space_->layout().lanes()) {
    // The next token, at `length`, attends to itself and the window - 1 before it.
    if (lane.window) limit = std::min(limit, length + Tokens(1) - *lane.window);
  }
  limit = std::max(limit, Tokens(0));
  if (position < Tokens(0) || position > limit) {
    throw InvalidArgument("drop_before takes a position between 0 and " +
                          std::to_string(limit.value) + " here (length " +
                          std::to_string(length.value) + " less the largest window), not " +
                          std::to_string(position.value));
  }
  if (position.value <= state.dropped.load(std::memory_order_relaxed)) return;

  const std::scoped_lock table(state.table);
  const Fence fence = fence_behind(state.slot, stream);
  state.stream = stream;
  {
    const std::scoped_lock lock(mutex_);
    slot(state.slot).fence = fence;
  }
  settle(state.slot);
  Edit edit = space_->edit(stream);
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    if (!space_->layout().lanes()[lane].window) continue;
    edit.drop(space_->span(state.slot, lane), {Pages(0), space_->page_of(lane, position)});
  }
  try {
    commit(edit);
  } catch (...) {
    state.is_lost = space_->is_broken(state.slot);
    throw;
  }
  const std::scoped_lock lock(mutex_);
  const Pages before = slot(state.slot).backed;
  update_mapped(state.slot);
  const Pages gone = before - slot(state.slot).backed;
  state.dropped_pages.fetch_add(gone.value, std::memory_order_relaxed);
  state.dropped.store(static_cast<std::int32_t>(position.value), std::memory_order_relaxed);
}

void Cache::release(SequenceState& state, Stream stream) {
  const std::scoped_lock table(state.table);
  Fence fence;
  try {
    fence = fence_behind(state.slot, stream);
  } catch (const Error&) {
    state.unclaim(state.is_lost ? Claim::lost : Claim::idle);
    throw;
  }
  if (!state.is_lost && store_->backend().is_passed(fence)) {
    const std::scoped_lock lock(mutex_);
    drop_shared(state.slot, Tokens(0));
  }
  vacate(state, fence);
  state.unclaim(Claim::released);
}

}  // namespace kvspan
