#include "span/span.hpp"

namespace kvspan {

PageRange Span::widened(PageRange range) const {
  if (range.is_empty()) return range;
  if ((*this)[range.first].is_backed()) range.first = frame_of(range.first).first;
  const Pages last{range.last.value - 1};
  if ((*this)[last].is_backed()) range.last = frame_of(last).last;
  return range;
}

PageRange Span::narrowed(PageRange range) const {
  if (range.is_empty()) return range;
  if ((*this)[range.first].is_backed() && frame_of(range.first).first < range.first) {
    range.first = frame_of(range.first).last;
  }
  if (range.is_empty()) return {range.first, range.first};
  const Pages last{range.last.value - 1};
  if ((*this)[last].is_backed() && frame_of(last).last > range.last) {
    range.last = frame_of(last).first;
  }
  return range;
}

void Span::set(Pages first, std::span<const PageEntry> entries) {
  const std::size_t needed = first.value + entries.size();
  if (needed > table_.size()) table_.resize(needed);
  for (const PageEntry& entry : entries) {
    PageEntry& place = table_[first.value];
    if (place.is_backed()) backed_ -= Pages(1);
    if (entry.is_backed()) backed_ += Pages(1);
    place = entry;
    ++first;
  }
  drop_unbacked_tail();
}

void Span::clear(PageRange range) {
  for (Pages page = range.first; page < range.last && page < end(); ++page) {
    if (table_[page.value].is_backed()) backed_ -= Pages(1);
    table_[page.value] = {};
  }
  drop_unbacked_tail();
}

void Span::drop_unbacked_tail() {
  while (!table_.empty() && !table_.back().is_backed()) table_.pop_back();
}

}  // namespace kvspan
