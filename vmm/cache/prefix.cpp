// Sequences and the prefix index: what a new sequence need not compute, and what others will find.
#include <algorithm>

#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

// How many of `pages`, from the first on, follow each other in one frame.
std::size_t run_in_frame(std::span<const PageEntry> pages) {
  std::size_t n = 1;
  while (n < pages.size() && pages[n].frame == pages[0].frame &&
         pages[n].offset_pages == pages[0].offset_pages + n) {
    ++n;
  }
  return n;
}

// Undoes what would change a part of a frame, old or new, until nothing does.
void keep_frames_whole(const Span& span, std::vector<PageEntry>& now) {
  const Pages end(static_cast<std::uint32_t>(now.size()));
  const auto may_change = [&](Pages page) {
    const PageEntry entry = now[page.value];
    const PageRange old = span.frame_of(page);
    if (entry.offset() > page || old.last > end) return false;
    for (Pages p = old.first; p < old.last; ++p) {
      if (now[p.value] == span[p]) return false;
    }
    const Pages first = page - entry.offset();
    const Pages n = pages_of(entry.frame.size_class());
    if (first + n > end) return false;
    for (Pages offset{}; offset < n; ++offset) {
      if (now[(first + offset).value] != PageEntry(entry.frame, offset)) return false;
    }
    return true;
  };
  for (bool is_done = false; !is_done;) {
    is_done = true;
    for (Pages page{}; page < end; ++page) {
      if (now[page.value] == span[page] || may_change(page)) continue;
      const PageRange old = span.frame_of(page);
      for (Pages p = old.first; p < std::min(old.last, end); ++p) now[p.value] = span[p];
      is_done = false;
    }
  }
}

// The lane that fills slowest decides: a chunk ends with the first token that touches no page up to
// there any more.
std::vector<Tokens> chunk_ends(const Space& space, std::size_t n_tokens) {
  Bytes record = space.layout().lanes().front().token_bytes;
  for (const Lane& lane : space.layout().lanes()) record = std::min(record, lane.token_bytes);
  std::vector<Tokens> ends;
  std::int64_t end = 0;
  for (std::uint64_t page = 1; end < static_cast<std::int64_t>(n_tokens); ++page) {
    end = std::max(end + 1,
                   static_cast<std::int64_t>(div_up(space.page_size().value * page, record.value)));
    ends.push_back(Tokens(end));
  }
  return ends;
}

}  // namespace

std::shared_ptr<Sequence> Cache::sequence(std::span<const std::int32_t> tokens, std::string salt,
                                          Tokens expected, Stream stream) {
  const std::shared_ptr<Space> space = this->space();  // another thread may close the cache
  check_expected(expected);
  const auto n_tokens = static_cast<std::int64_t>(tokens.size());
  expected = std::max(expected, Tokens(n_tokens));
  // The last token is always computed: what follows it is what the caller is after.
  const Tokens most(std::max<std::int64_t>(n_tokens - 1, 0));
  PrefixIndex::Found found = prefixes_.find(salt, tokens, chunk_ends(*space, tokens.size()), most);
  Tokens length = found.tokens;
  for (std::size_t lane = 0; lane < found.pages.size(); ++lane) {
    // A token that straddles into the next page is not there yet.
    length = std::min(
        length,
        space->whole_tokens(lane, Pages(static_cast<std::uint32_t>(found.pages[lane].size()))));
  }
  if (length == Tokens(0)) {
    std::shared_ptr<Sequence> made = sequence(expected, stream);
    made->state()->salt = std::move(salt);
    if (!tokens.empty()) prefixes_.count(length);
    return made;
  }

  std::shared_ptr<SequenceState> state;
  {
    const std::scoped_lock lock(mutex_);
    check_open();
    state = occupy(emptiest_free_slot());
  }
  try {
    settle(state->slot);
    for (const Fence& written : found.written) {
      if (store_->backend().is_passed(written)) continue;
      space_->account().add(Call::order_after, 1);
      store_->backend().order_after(stream, written);
    }
    if (space_->has_windows()) store_->backend().wait(store_->backend().record_fence(stream));
    Edit edit = space_->edit(stream);
    plan_prefix(edit, state->slot, found.pages, length);
    commit(edit);
  } catch (...) {
    leave(*state);
    throw;
  }
  {
    const std::scoped_lock lock(mutex_);
    update_mapped(state->slot);
    state->length.store(static_cast<std::int32_t>(length.value), std::memory_order_relaxed);
    announce(*state, expected);
    state->stream = stream;
    state->salt = std::move(salt);
    update_capacity(*state);
  }
  state->table.unlock();
  state->unclaim();
  store_->background().wake();
  prefixes_.count(length);
  return std::make_shared<Sequence>(shared_from_this(), std::move(state));
}

void Cache::plan_prefix(Edit& edit, SlotId to, const LanePages& pages, Tokens length) {
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const std::span<const PageEntry> source = pages[lane];
    const Span& target = space_->span(to, lane);
    const Pages below = space_->page_of(lane, length), end = space_->pages_for(lane, length);
    const Pages needed = space_->pages_with_overread(lane, length);
    std::vector<PageEntry> entries(std::max(needed, target.end()).value);
    std::fill_n(entries.begin(), needed.value, PageEntry::wanted());
    // Whole frames below the length are shared, as in a fork, and what else there is is copied: the
    // last page's beginning, and parts of frames, where chains branch inside of them.
    Bytes left = space_->byte_of(lane, length);
    for (Pages page{}; page < end;) {
      const PageEntry first = source[page.value];
      const Pages n(
          static_cast<std::uint32_t>(run_in_frame(source.subspan(page.value, (end - page).value))));
      const Pages frame_pages = pages_of(first.frame.size_class());
      const Bytes size = std::min(left, space_->page_size() * n.value);
      if (n == frame_pages && page + n <= below) {
        std::copy_n(source.begin() + page.value, n.value, entries.begin() + page.value);
      } else {
        edit.copy_from(target.address_of(page), first.frame,
                       space_->page_size() * first.offset_pages, size);
      }
      page += n;
      left -= size;
    }
    space_->place(edit, to, lane, entries);
  }
}

Tokens Cache::publish(SequenceState& state, std::span<const std::int32_t> tokens, bool merges,
                      Stream stream) {
  if (static_cast<std::int64_t>(tokens.size()) > state.tokens().value) {
    throw InvalidArgument("commit was given " + std::to_string(tokens.size()) +
                          " tokens of a sequence of " + std::to_string(state.tokens().value));
  }
  follow(state, stream);
  const std::scoped_lock table(state.table);
  const std::vector<Tokens> ends = chunk_ends(*space_, tokens.size());
  const auto pages_before = [&](std::size_t lane, std::size_t chunk) {
    if (chunk == 0) return Pages(0);
    return Pages(space_->page_of(lane, ends[chunk - 1]));
  };
  std::size_t n = ends.size();
  while (n > 0 && ends[n - 1].value > static_cast<std::int64_t>(tokens.size())) --n;
  // A frame is shared whole, so all of it must have been written.
  std::vector<Pages> complete;
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& span = space_->span(state.slot, lane);
    Pages page{};
    while (page < pages_before(lane, n) && span[page].is_backed()) ++page;
    complete.push_back(span.narrowed({Pages(0), page}).last);
  }
  const auto is_complete = [&](std::size_t chunk) {
    for (std::size_t lane = 0; lane < complete.size(); ++lane) {
      if (pages_before(lane, chunk) > complete[lane]) return false;
    }
    return true;
  };
  while (n > 0 && !is_complete(n)) --n;
  if (n == 0) return Tokens(0);

  std::vector<PrefixIndex::Chunk> chunks(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto begin = static_cast<std::size_t>(i == 0 ? 0 : ends[i - 1].value);
    chunks[i].tokens = tokens.subspan(begin, static_cast<std::size_t>(ends[i].value) - begin);
    chunks[i].pages.resize(space_->n_lanes());
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      const Span& span = space_->span(state.slot, lane);
      for (Pages page = pages_before(lane, i); page < pages_before(lane, i + 1); ++page) {
        chunks[i].pages[lane].push_back(span[page]);
      }
    }
  }
  Pages new_pages{};
  space_->account().add(Call::record_fence, 1);
  const Fence written = store_->backend().record_fence(stream);
  const PrefixIndex::Found known = prefixes_.publish(state.salt, chunks, written, new_pages);
  shared_pages_.fetch_add(new_pages.value, std::memory_order_relaxed);
  if (merges && !known.pins.empty()) merge(state, chunks, known, stream);
  return ends[n - 1];
}

// Twice the same tokens: the frames that came first serve both.
void Cache::merge(SequenceState& state, std::span<const PrefixIndex::Chunk> chunks,
                  const PrefixIndex::Found& known, Stream stream) {
  Backend& backend = store_->backend();
  for (const Fence& fence : known.written) backend.wait(fence);
  backend.wait(backend.record_fence(stream));
  settle(state.slot);
  Edit edit = space_->edit(stream);
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& span = space_->span(state.slot, lane);
    std::vector<PageEntry> now;
    for (const PrefixIndex::Chunk& chunk : chunks) {
      now.insert(now.end(), chunk.pages[lane].begin(), chunk.pages[lane].end());
    }
    keep_frames_whole(span, now);
    space_->place(edit, state.slot, lane, now);
  }
  if (edit.is_empty()) return;
  try {
    commit(edit);
  } catch (...) {
    state.is_lost = space_->is_broken(state.slot);
    throw;
  }
  merged_pages_.fetch_add(static_cast<std::uint64_t>(edit.shared_pages()),
                          std::memory_order_relaxed);
  const std::scoped_lock lock(mutex_);
  update_mapped(state.slot);
  update_capacity(state);
}

Pages Cache::evict_prefixes(Pages wanted) noexcept {
  Pages let_go{};
  const Pages freed = prefixes_.evict(wanted, let_go);
  shared_pages_.fetch_sub((let_go - freed).value, std::memory_order_relaxed);
  return freed;
}

}  // namespace kvspan
