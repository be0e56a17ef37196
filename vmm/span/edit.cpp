#include "span/edit.hpp"

#include <algorithm>

#include "core/errors.hpp"

namespace kvspan {

namespace {

// The frames that back `entries`, each once: a frame's first page has offset 0.
template <class F>
void for_each_frame(std::span<const PageEntry> entries, F f) {
  for (const PageEntry& entry : entries) {
    if (entry.is_backed() && entry.offset() == Pages(0)) f(entry.frame);
  }
}

// Puts zeros into what is neither backed nor wanted of a range, up to the end of the span's window.
void fill_with_zeros(const Span& span, PageRange range, std::span<PageEntry> entries) {
  const auto is_empty = [](const PageEntry& e) { return !e.is_mapped() && !e.is_wanted(); };
  const Pages end = std::min(range.last, span.window());
  if (range.first >= end) return;
  entries = entries.first((end - range.first).value);
  for (auto gap = entries.begin(); gap != entries.end();) {
    gap = std::find_if(gap, entries.end(), is_empty);
    const auto last = std::find_if_not(gap, entries.end(), is_empty);
    span.zeros()->fill({gap, last});
    gap = last;
  }
}

}  // namespace

// Frames mapped for as long as a block lasts, in a range of their own: where they are filled before
// they are shown.
class Edit::Window {
 public:
  Window(Edit& edit, std::span<const PageEntry> entries)
      : edit_(edit),
        entries_(entries),
        range_(edit.store_.backend().reserve(edit.store_.page_size() * entries.size(),
                                             Unmapped::fault)) {
    try {
      edit_.map(range_.base, entries_, mapped_);
    } catch (...) {
      close();
      throw;
    }
  }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  ~Window() { close(); }

  Address base() const { return range_.base; }

 private:
  void close() noexcept {
    const auto mapped = entries_.first(mapped_.value);
    Pages done{};
    try {
      Backend& backend = edit_.store_.backend();
      if (edit_.has_queued_work_) backend.wait(backend.record_fence(edit_.stream_));
      edit_.unmap(range_.base, mapped, done);
      backend.free(range_);
    } catch (const Error&) {
      // Frames that are stuck in a range that nobody knows must not serve anybody else.
      for_each_frame(mapped, [&](FrameId frame) { edit_.store_.keep_for_ever(frame); });
    }
  }

  Edit& edit_;
  const std::span<const PageEntry> entries_;
  const VirtualRange range_;
  Pages mapped_{};
};

void Edit::add(Span& span, PageRange range, std::span<const PageEntry> now, Bytes live) {
  const auto is_empty_at = [&](std::size_t i) { return now.empty() || now[i] == PageEntry(); };
  const PageRange whole =
      span.with_zeros(range, is_empty_at(0), is_empty_at(range.count().value - 1));
  Patch& patch = patches_.emplace_back(Patch{.span = &span, .range = whole, .live = live});
  patch.old.reserve(whole.count().value);
  for (Pages page = whole.first; page < whole.last; ++page) patch.old.push_back(span.mapped(page));
  if (std::ranges::none_of(patch.old, &PageEntry::is_mapped)) patch.old.clear();
  patch.now.resize(whole.count().value);
  std::ranges::copy(now, patch.now.begin() + (range.first - whole.first).value);
  fill_with_zeros(span, whole, patch.now);
  if (std::ranges::all_of(patch.now, [](const PageEntry& e) { return e == PageEntry(); })) {
    patch.now.clear();
  }
}

void Edit::add_fresh(Span& span, PageRange range, Bytes live, OwnerTag owner, bool always_scrub) {
  add(span, range, std::vector(range.count().value, PageEntry::wanted()), live);
  gaps_.push_back({range.count(), owner, always_scrub});
}

void Edit::back(Span& span, PageRange range, OwnerTag owner, bool always_scrub) {
  for (Pages page = range.first; page < range.last;) {
    if (span[page].is_backed()) {
      ++page;
      continue;
    }
    Pages last = page;
    while (last < range.last && !span[last].is_backed()) ++last;
    add_fresh(span, {page, last}, Bytes(0), owner, always_scrub);
    page = last;
  }
}

void Edit::own(Span& span, PageRange range, Bytes live, OwnerTag owner, bool always_scrub) {
  const Address live_end = span.address_of(range.first) + live;
  range = span.widened(range);
  for (Pages page = range.first; page < range.last;) {
    if (!span[page].is_backed()) {
      ++page;
      continue;
    }
    const PageRange frame = span.frame_of(page);
    if (store_.references(span[page].frame) > 1) {
      const Address begin = span.address_of(frame.first);
      const Bytes kept = live_end > begin
                             ? std::min(live_end - begin, span.page_size() * frame.count().value)
                             : Bytes(0);
      add_fresh(span, frame, kept, owner, always_scrub);
    }
    page = frame.last;
  }
}

void Edit::place(Span& span, Pages first, std::span<const PageEntry> entries, OwnerTag owner,
                 bool always_scrub) {
  const auto now = [&](Pages page) { return entries[(page - first).value]; };
  const auto rest_of_frame = [](const PageEntry& e) {
    return e.is_backed() ? pages_of(e.frame.size_class()) - e.offset() : Pages(1);
  };
  const Pages end = first + Pages(static_cast<std::uint32_t>(entries.size()));
  for (Pages page = first; page < end;) {
    if (now(page) == span[page]) {
      ++page;
      continue;
    }
    // From here to where whole frames end, old and new, and the two agree again. Zeros in between
    // belong to it, for what is to the left and right of them may share one frame of zeros.
    PageRange range{page, page};
    const auto differs = [&](Pages p) { return now(p) != span[p] || span.mapped(p).is_zeros(); };
    while (range.last < end && differs(range.last)) {
      range.last += std::min(rest_of_frame(span[range.last]), rest_of_frame(now(range.last)));
    }
    const auto part = entries.subspan((page - first).value, range.count().value);
    add(span, range, part, Bytes(0));
    for (auto it = part.begin(); it != part.end();) {
      const auto run = std::ranges::find_if_not(it, part.end(), &PageEntry::is_wanted);
      if (run != it) {
        gaps_.push_back({Pages(static_cast<std::uint32_t>(run - it)), owner, always_scrub});
      }
      it = std::ranges::find_if(run, part.end(), &PageEntry::is_wanted);
    }
    page = range.last;
  }
}

void Edit::drop(Span& span, PageRange range) {
  range.last = std::min(range.last, span.end());
  range = span.narrowed(range);
  const auto is_backed = [&] {
    for (Pages page = range.first; page < range.last; ++page) {
      if (span[page].is_backed()) return true;
    }
    return false;
  };
  if (is_backed()) add(span, range, {}, Bytes(0));
}

void Edit::commit() {
  if (!gaps_.empty()) store_.take(gaps_, taken_, effort_);
  try {
    assign_frames();
    add_references();
    prepare_publishing();
    // What only adds comes first, what only takes away last: the less there is to undo the better.
    const auto rank = [](const Patch& p) { return p.old.empty() ? 0 : p.now.empty() ? 2 : 1; };
    std::ranges::stable_sort(patches_, {}, rank);
    for (Patch& patch : patches_) apply(patch);
    for (const Copy& c : copies_) copy_bytes(c.to, c.from, c.size);
    for (const Load& load : loads_) {
      std::vector<PageEntry> pages;
      for (Pages page{}; page < pages_of(load.frame.size_class()); ++page) {
        pages.push_back({load.frame, page});
      }
      const Window window(*this, pages);
      copy_bytes(load.to, window.base() + load.offset, load.size);
    }
  } catch (...) {
    undo();
    throw;
  }
  publish();
}

void Edit::assign_frames() {
  std::size_t next = 0;
  for (Patch& patch : patches_) {
    patch.first_taken = next;
    for (std::size_t i = 0; i < patch.now.size();) {
      if (!patch.now[i].is_wanted()) {
        ++i;
        continue;
      }
      const FrameId frame = taken_[next++].frame;
      for (Pages offset{}; offset < pages_of(frame.size_class()); ++offset) {
        patch.now[i++] = {frame, offset};
      }
    }
  }
}

void Edit::add_references() {
  std::size_t next = 0;  // among the taken: those have their reference
  for (const Patch& patch : patches_) {
    for_each_frame(patch.now, [&](FrameId frame) {
      if (next < taken_.size() && taken_[next].frame == frame) {
        ++next;
        return;
      }
      referenced_.reserve(referenced_.size() + 1);
      store_.share(frame);
      referenced_.push_back(frame);
    });
  }
}

void Edit::prepare_publishing() {
  for (const Patch& patch : patches_) {
    for_each_frame(patch.old, [&](FrameId frame) { given_.push_back(frame); });
    if (!patch.now.empty()) patch.span->reserve(patch.range.last);
  }
}

void Edit::apply(Patch& patch) {
  const Address at = patch.span->address_of(patch.range.first);
  if (patch.live > Bytes(0)) copy_live(patch);
  unmap(at, patch.old, patch.unmapped);
  map(at, patch.now, patch.mapped);
  if (patch.live == Bytes(0)) scrub(patch, at);
}

void Edit::copy_live(const Patch& patch) {
  // The old frames must stay readable until the bytes are out, so the new ones are filled
  // elsewhere.
  Backend& backend = store_.backend();
  const Window window(*this, patch.now);
  scrub(patch, window.base());
  copy_bytes(window.base(), patch.span->address_of(patch.range.first), patch.live);
  backend.wait(backend.record_fence(stream_));
  has_queued_work_ = false;
}

void Edit::copy_bytes(Address to, Address from, Bytes size) {
  account_.add(Call::copy, 1);
  store_.backend().copy(to, from, size, stream_);
  has_queued_work_ = true;  // not before: on a stream that is refused, nothing could be waited for
}

void Edit::scrub(const Patch& patch, Address at) {
  std::size_t next = patch.first_taken;
  for (std::size_t i = 0; i < patch.now.size() && next < taken_.size(); ++i) {
    const PageEntry& entry = patch.now[i];
    if (entry.frame != taken_[next].frame) continue;
    if (taken_[next].is_dirty) {
      account_.add(Call::fill, 1);
      store_.backend().fill(at + patch.span->page_size() * i, 0,
                            patch.span->page_size() * pages_of(entry.frame.size_class()).value,
                            stream_);
      has_queued_work_ = true;
    }
    ++next;
  }
}

void Edit::publish() noexcept {
  for (const Patch& patch : patches_) {
    if (patch.now.empty()) {
      patch.span->clear(patch.range);
    } else {
      patch.span->set(patch.range.first, patch.now);
    }
  }
  for (const FrameId frame : referenced_) shared_pages_ += pages_of(frame.size_class()).value;
  Pages pages{};
  for (const FrameId frame : given_) pages += pages_of(frame.size_class());
  shared_pages_ -= (pages - store_.give(given_)).value;
}

void Edit::undo() noexcept {
  for (auto patch = patches_.rbegin(); patch != patches_.rend(); ++patch) undo(*patch);
  store_.give(referenced_);
  store_.give_back(taken_);
}

void Edit::undo(Patch& patch) noexcept {
  const Address at = patch.span->address_of(patch.range.first);
  try {
    // Fills and copies of this edit may still be under way there.
    Backend& backend = store_.backend();
    if (has_queued_work_) backend.wait(backend.record_fence(stream_));
    Pages undone{};
    unmap(at, std::span(patch.now).first(patch.mapped.value), undone);
    undone = {};
    map(at, std::span(patch.old).first(patch.unmapped.value), undone);
  } catch (...) {
    // The driver refuses what it did a moment ago. Better a span that is known to be lost than one
    // that reads as zeros where the user's tokens were.
    patch.span->mark_broken();
  }
}

void Edit::map(Address at, std::span<const PageEntry> entries, Pages& done) {
  const Bytes page_size = store_.page_size();
  for (std::size_t i = 0; i < entries.size();) {
    if (!entries[i].is_mapped()) {
      done = Pages(static_cast<std::uint32_t>(++i));
      continue;
    }
    FrameRun run{entries[i].frame, 1};
    const std::uint32_t frame_pages = pages_of(run.first.size_class()).value;
    std::size_t end = i + frame_pages;
    const bool is_zeros = entries[i].is_zeros();
    while (end < entries.size() && !is_zeros && entries[end].is_backed() &&
           entries[end].frame == run.first.next(run.count)) {
      ++run.count;
      end += frame_pages;
    }
    store_.backend().count(account_, Call::map, run.count);
    store_.backend().map(at + page_size * i, run, is_zeros ? Access::read : Access::read_write);
    i = end;
    done = Pages(static_cast<std::uint32_t>(i));
  }
}

void Edit::unmap(Address at, std::span<const PageEntry> entries, Pages& done) {
  const Bytes page_size = store_.page_size();
  for (std::size_t i = 0; i < entries.size();) {
    if (!entries[i].is_mapped()) {
      done = Pages(static_cast<std::uint32_t>(++i));
      continue;
    }
    std::uint32_t handles = 0;
    std::size_t end = i;
    while (end < entries.size() && entries[end].is_mapped()) {
      if (entries[end].offset() == Pages(0)) ++handles;
      ++end;
    }
    account_.add(Call::unmap, handles);
    store_.backend().unmap({at + page_size * i, page_size * (end - i)}, handles);
    i = end;
    done = Pages(static_cast<std::uint32_t>(i));
  }
}

}  // namespace kvspan
