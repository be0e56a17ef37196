// A span: a contiguous virtual range and its page table, page -> (frame, offset in the frame).
//
// The range is part of a reservation and never moves, so pointers into it stay valid while pages
// come and go. Spans are plain data: an `Edit` changes them, and whoever owns the slot that a span
// belongs to sees to it that one thread at a time does.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/ids.hpp"

namespace kvspan {

// What stands in one place of a page table. A frame is mapped whole: the pages of a frame of n
// pages stand one behind the other in the table, with offsets 0 to n - 1.
struct PageEntry {
  FrameId frame;
  std::uint32_t offset_pages : 31;
  std::uint32_t zeros : 1;  // the frame is one of zeros, mapped because no memory backs the page

  PageEntry() : PageEntry(FrameId(), Pages(0)) {}
  PageEntry(FrameId f, Pages offset, bool is_zeros = false)
      : frame(f), offset_pages(offset.value & 0x7fffffffu), zeros(is_zeros) {}

  // In a plan only: a page that is to get a new frame.
  static PageEntry wanted() { return {FrameId(), Pages(1)}; }

  Pages offset() const { return Pages(offset_pages); }
  bool is_mapped() const { return !frame.is_none(); }
  bool is_zeros() const { return zeros != 0; }
  bool is_backed() const { return is_mapped() && !is_zeros(); }
  bool is_wanted() const { return *this == wanted(); }
  bool operator==(const PageEntry&) const = default;
};

static_assert(sizeof(PageEntry) == 8);

struct PageRange {
  Pages first;
  Pages last;  // exclusive

  Pages count() const { return last > first ? last - first : Pages(0); }
  bool is_empty() const { return first >= last; }
};

// Frames of zeros, one of each size class (zeros.hpp).
struct ZeroSet {
  std::vector<FrameId> frames;  // by class

  // Fills a gap, small frames first: growing takes away pages at the front, one at a time.
  void fill(std::span<PageEntry> gap) const;
};

class Span {
 public:
  Span(Address base, Pages size, Bytes page_size)
      : base_(base), size_(size), page_size_(page_size) {}
  // Its first `window` pages read as zeros where they are not backed, once an edit has mapped them.
  Span(Address base, Pages size, Bytes page_size, Pages window, const ZeroSet& zeros)
      : base_(base), size_(size), page_size_(page_size), window_(window), zeros_(&zeros) {}

  Pages size() const { return size_; }
  Pages backed_pages() const { return backed_; }
  Address address_of(Pages page) const { return base_ + page_size_ * page.value; }
  Bytes page_size() const { return page_size_; }

  // What backs a page: zeros do not.
  PageEntry operator[](Pages page) const {
    const PageEntry entry = mapped(page);
    return entry.is_backed() ? entry : PageEntry();
  }
  // One past the last page that is backed.
  Pages end() const { return end_; }

  // What is mapped at a page, zeros included, and one past the last page at which something is.
  PageEntry mapped(Pages page) const {
    return page.value < table_.size() ? table_[page.value] : PageEntry();
  }
  Pages mapped_end() const { return Pages(static_cast<std::uint32_t>(table_.size())); }

  // The pages of the frame that is mapped at `page`.
  PageRange frame_of(Pages page) const {
    const PageEntry entry = mapped(page);
    const Pages first = page - entry.offset();
    return {first, first + pages_of(entry.frame.size_class())};
  }

  // `range` grown to whole frames at both ends (unbacked pages stand alone).
  PageRange widened(PageRange range) const;
  // `range` shrunk to the frames that lie in it whole.
  PageRange narrowed(PageRange range) const;

  // The part of the span that reads as zeros where nothing backs it, and by which frames.
  Pages window() const { return window_; }
  const ZeroSet* zeros() const { return zeros_; }

  // `range` grown by the frames of zeros that it cuts through, and, at an end that is to be zeros
  // itself, by those next to it that are not of the largest class: so that gaps stay few frames.
  PageRange with_zeros(PageRange range, bool joins_before, bool joins_behind) const;

  // Makes room in the table, so that a later `set` up to `end` cannot fail.
  void reserve(Pages end) { table_.reserve(end.value); }

  // Writes the table without touching any mapping.
  void set(Pages first, std::span<const PageEntry> entries);
  void clear(PageRange range);

  // An undo failed: pages that should be backed are not. What the span holds is lost.
  bool is_broken() const { return broken_; }
  void mark_broken() { broken_ = true; }

 private:
  void update_ends();

  Address base_;
  Pages size_;
  Bytes page_size_;
  Pages window_{};
  const ZeroSet* zeros_ = nullptr;
  Pages backed_{};
  Pages end_{};
  bool broken_ = false;
  std::vector<PageEntry> table_;  // as long as the last mapped page needs
};

}  // namespace kvspan
