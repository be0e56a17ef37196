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
  Pages offset;

  // In a plan only: a page that is to get a new frame.
  static PageEntry wanted() { return {FrameId(), Pages(1)}; }

  bool is_backed() const { return !frame.is_none(); }
  bool is_wanted() const { return *this == wanted(); }
  bool operator==(const PageEntry&) const = default;
};

struct PageRange {
  Pages first;
  Pages last;  // exclusive

  Pages count() const { return last > first ? last - first : Pages(0); }
  bool is_empty() const { return first >= last; }
};

class Span {
 public:
  Span(Address base, Pages size, Bytes page_size)
      : base_(base), size_(size), page_size_(page_size) {}

  Pages size() const { return size_; }
  Pages backed_pages() const { return backed_; }
  Address address_of(Pages page) const { return base_ + page_size_ * page.value; }
  Bytes page_size() const { return page_size_; }

  PageEntry operator[](Pages page) const {
    return page.value < table_.size() ? table_[page.value] : PageEntry{};
  }

  // One past the last page that is backed.
  Pages end() const { return Pages(static_cast<std::uint32_t>(table_.size())); }

  // The pages of the frame that backs `page`.
  PageRange frame_of(Pages page) const {
    const PageEntry entry = (*this)[page];
    const Pages first = page - entry.offset;
    return {first, first + pages_of(entry.frame.size_class())};
  }

  // `range` grown to whole frames at both ends (unbacked pages stand alone).
  PageRange widened(PageRange range) const;
  // `range` shrunk to the frames that lie in it whole.
  PageRange narrowed(PageRange range) const;

  // Makes room in the table, so that a later `set` up to `end` cannot fail.
  void reserve(Pages end) { table_.reserve(end.value); }

  // Writes the table without touching any mapping.
  void set(Pages first, std::span<const PageEntry> entries);
  void clear(PageRange range);

  // An undo failed: pages that should be backed are not. What the span holds is lost.
  bool is_broken() const { return broken_; }
  void mark_broken() { broken_ = true; }

 private:
  void drop_unbacked_tail();

  Address base_;
  Pages size_;
  Bytes page_size_;
  Pages backed_{};
  bool broken_ = false;
  std::vector<PageEntry> table_;  // as long as the last backed page needs
};

}  // namespace kvspan
