// Sequences and the prefix index: what a new sequence need not compute, and what others will find.
#include <algorithm>

#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

// How many tokens lie whole in so many pages.
Tokens whole_tokens(const Space& space, std::size_t lane, std::size_t n_pages) {
  const Bytes bytes = space.page_size() * n_pages;
  return Tokens(
      static_cast<std::int64_t>(bytes.value / space.layout().lanes()[lane].token_bytes.value));
}

// All pages of the frames that `pages` begin with, as far as they hold `n` of those.
std::vector<PageEntry> whole_frames(std::span<const PageEntry> pages, Pages n) {
  std::vector<PageEntry> frames;
  while (frames.size() < n.value) {
    const FrameId frame = pages[frames.size()].frame;
    for (Pages offset{}; offset < pages_of(frame.size_class()); ++offset) {
      frames.push_back({frame, offset});
    }
  }
  return frames;
}

}  // namespace

// The lane that fills slowest decides: a chunk ends with the first token that touches no page up to
// there any more.
std::vector<Tokens> Cache::chunk_ends(std::size_t n_tokens) const {
  Bytes record = space_->layout().lanes().front().token_bytes;
  for (const Lane& lane : space_->layout().lanes()) record = std::min(record, lane.token_bytes);
  std::vector<Tokens> ends;
  std::int64_t end = 0;
  for (std::uint64_t page = 1; end < static_cast<std::int64_t>(n_tokens); ++page) {
    end = std::max(
        end + 1, static_cast<std::int64_t>(div_up(space_->page_size().value * page, record.value)));
    ends.push_back(Tokens(end));
  }
  return ends;
}

std::shared_ptr<Sequence> Cache::sequence(std::span<const std::int32_t> tokens, std::string salt,
                                          Tokens expected, Stream stream) {
  check_usable();
  {
    const std::scoped_lock lock(mutex_);
    check_open();
  }
  // The last token is always computed: what follows it is what the caller is after.
  const Tokens most(std::max<std::int64_t>(static_cast<std::int64_t>(tokens.size()) - 1, 0));
  PrefixIndex::Found found = prefixes_.find(salt, tokens, chunk_ends(tokens.size()), most);
  Tokens length = found.tokens;
  for (std::size_t lane = 0; lane < found.pages.size(); ++lane) {
    // A token that straddles into the next page is not there yet.
    length = std::min(length, whole_tokens(*space_, lane, found.pages[lane].size()));
  }
  if (!tokens.empty()) prefixes_.count(length);
  if (length == Tokens(0)) {
    std::shared_ptr<Sequence> made = sequence(expected, stream);
    made->state()->salt = std::move(salt);
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
      if (!store_->backend().is_passed(written)) store_->backend().order_after(stream, written);
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
    state->stream = stream;
    state->salt = std::move(salt);
    update_capacity(*state);
  }
  state->table.unlock();
  state->unclaim();
  return std::make_shared<Sequence>(shared_from_this(), std::move(state));
}

void Cache::plan_prefix(Edit& edit, SlotId to, const LanePages& pages, Tokens length) {
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const std::span<const PageEntry> source = pages[lane];
    const Span& target = space_->span(to, lane);
    // Whole frames below the length are shared, as in a fork; the rest is copied.
    Pages shared{};
    const Pages below = space_->page_of(lane, length);
    while (shared < below) {
      const Pages end = shared + pages_of(source[shared.value].frame.size_class());
      if (end > below) break;
      shared = end;
    }
    const Pages needed = space_->pages_with_overread(lane, length);
    std::vector<PageEntry> entries(std::max(needed, target.end()).value);
    std::copy_n(source.begin(), shared.value, entries.begin());
    for (Pages page = shared; page < needed; ++page) entries[page.value] = PageEntry::wanted();
    space_->place(edit, to, lane, entries);

    const Bytes tail = space_->byte_of(lane, length) - space_->page_size() * shared.value;
    if (tail > Bytes(0)) {
      const Pages n = space_->pages_for(lane, length) - shared;
      edit.copy_from(target.address_of(shared), whole_frames(source.subspan(shared.value), n),
                     tail);
    }
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
  const std::vector<Tokens> ends = chunk_ends(tokens.size());
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
    // Frames stay whole: one that only part of would change stays as it is, all of it.
    const Pages end(static_cast<std::uint32_t>(now.size()));
    for (bool is_settled = false; !is_settled;) {
      is_settled = true;
      for (Pages page{}; page < end; ++page) {
        const PageEntry entry = now[page.value];
        if (entry == span[page]) continue;
        const Pages first = page - std::min(page, entry.offset());
        const Pages last = first + pages_of(entry.frame.size_class());
        bool is_whole = entry.offset() <= page && last <= end;
        for (Pages p = first; is_whole && p < last; ++p) {
          is_whole = now[p.value] == PageEntry(entry.frame, p - first);
        }
        if (is_whole) continue;
        const PageRange own = span.frame_of(page);
        for (Pages p = own.first; p < std::min(own.last, end); ++p) now[p.value] = span[p];
        is_settled = false;
      }
    }
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
