#include "span/span.hpp"

#include <algorithm>
#include <bit>

namespace kvspan {

void ZeroSet::fill(std::span<PageEntry> gap) const {
  while (!gap.empty()) {
    const auto smallest = static_cast<std::size_t>(std::countr_zero(gap.size()));
    const FrameId frame = frames[std::min(smallest, frames.size() - 1)];
    const std::uint32_t n = pages_of(frame.size_class()).value;
    for (std::uint32_t i = 0; i < n; ++i) gap[i] = {frame, Pages(i), true};
    gap = gap.subspan(n);
  }
}

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

PageRange Span::with_zeros(PageRange range, bool joins_before, bool joins_behind) const {
  const auto grow = [&](Pages page, bool joins) {
    const PageEntry entry = mapped(page);
    if (!entry.is_zeros()) return false;
    const PageRange frame = frame_of(page);
    const bool is_cut = frame.first < range.last && frame.last > range.first;
    if (!is_cut && (!joins || entry.frame == zeros_->frames.back())) return false;
    range = {std::min(range.first, frame.first), std::max(range.last, frame.last)};
    return true;
  };
  while (range.first > Pages(0) && grow(range.first - Pages(1), joins_before)) {
  }
  while (grow(range.last, joins_behind)) {
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
  update_ends();
}

void Span::clear(PageRange range) {
  for (Pages page = range.first; page < range.last && page < mapped_end(); ++page) {
    if (table_[page.value].is_backed()) backed_ -= Pages(1);
    table_[page.value] = {};
  }
  update_ends();
}

void Span::update_ends() {
  while (!table_.empty() && !table_.back().is_mapped()) table_.pop_back();
  end_ = mapped_end();
  while (end_ > Pages(0) && !table_[end_.value - 1].is_backed()) end_ -= Pages(1);
}

}  // namespace kvspan
