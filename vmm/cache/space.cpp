#include "cache/space.hpp"

#include <algorithm>
#include <map>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

Space::Space(std::shared_ptr<FrameStore> store, Layout layout, const SpaceOptions& options)
    : store_(std::move(store)), layout_(std::move(layout)), options_(options) {
  try {
    reserve();
    if (options_.unmapped == Unmapped::zero && !store_->backend().traits().zero_on_unmapped) {
      show_zeros();
    }
  } catch (...) {
    take_down();
    throw;
  }
}

void Space::reserve() {
  // Stale bytes are harmless to a lane only if they were written as the same dtype at the same
  // alignment: lanes of one dtype share a tag, the others never reuse without zeroing.
  std::map<DType, OwnerTag> tags;
  const std::uint64_t slots = static_cast<std::uint64_t>(options_.n_slots);
  const auto positions =
      static_cast<std::uint64_t>((options_.max_seq_len + options_.overread).value);
  Backend& backend = store_->backend();
  const bool has_zeros = backend.traits().zero_on_unmapped;
  for (const Lane& lane : layout_.lanes()) {
    std::uint64_t bytes = 0, all_bytes = 0;
    if (__builtin_mul_overflow(positions, lane.token_bytes.value, &bytes) ||
        bytes > UINT64_MAX - page_size().value ||
        __builtin_mul_overflow(round_up(bytes, page_size().value), slots, &all_bytes) ||
        div_up(bytes, page_size().value) > UINT32_MAX) {
      throw InvalidArgument("max_seq_len and max_seqs ask for more than the address space holds");
    }
    const std::uint64_t pages = div_up(bytes, page_size().value);
    slot_pages_.push_back(Pages(static_cast<std::uint32_t>(pages)));
    const auto [tag, is_new] = tags.try_emplace(lane.dtype);
    if (is_new || !lane.is_uniform) tag->second = store_->new_owner();
    owners_.push_back(tag->second);
    account_.add(Call::reserve, 1);
    reservations_.push_back(backend.reserve(page_size() * (pages * slots),
                                            has_zeros ? options_.unmapped : Unmapped::fault));
  }
  spans_.reserve(slots * n_lanes());
  for (std::uint64_t slot = 0; slot < slots; ++slot) {
    for (std::size_t lane = 0; lane < n_lanes(); ++lane) {
      spans_.emplace_back(reservations_[lane].base + slot_bytes(lane) * slot, slot_pages_[lane],
                          page_size());
    }
  }
}

void Space::show_zeros() {
  Pages largest{};
  for (std::size_t lane = 0; lane < n_lanes(); ++lane) largest = std::max(largest, window_of(lane));
  const std::string hint = "zeros in the first " + std::to_string(options_.static_len.value) +
                           " positions of " + std::to_string(options_.n_slots) +
                           " slots take too much: lower static_len or max_seqs, or give the pool "
                           "a larger max_frame_size";
  try {
    zeros_ = std::make_unique<Zeros>(*store_, account_, spans_.size(), largest);
    Edit edit = this->edit(store_->backend().own_stream());
    for (std::size_t i = 0; i < spans_.size(); ++i) {
      Span& span = spans_[i];
      span = Span(span.address_of(Pages(0)), span.size(), page_size(), window_of(i % n_lanes()),
                  zeros_->set_of(i));
      edit.show_zeros(span);
    }
    edit.commit();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.requested(), error.free(), error.reclaimable(), hint);
  } catch (const CapacityError& error) {
    throw CapacityError(hint + ": " + error.what());
  }
}

Pages Space::window_of(std::size_t lane) const {
  const bool is_whole = options_.static_len == options_.max_seq_len;
  return is_whole ? slot_pages_[lane] : pages_for(lane, options_.static_len);
}

Space::~Space() {
  Backend& backend = store_->backend();
  if (!backend.usable()) return;  // a child of fork(2): all of this is the parent's
  backend.finish();  // nobody can say any more on which streams kernels read this memory
  take_down();
}

void Space::take_down() noexcept {
  std::vector<bool> is_stuck(reservations_.size());  // by lane
  for (std::size_t i = 0; i < spans_.size(); ++i) {
    if (!unmap_all(spans_[i])) is_stuck[i % n_lanes()] = true;
  }
  // What is stuck stays for ever: better a leak than a page under somebody else's tokens.
  if (zeros_ && std::ranges::count(is_stuck, true) > 0) zeros_->keep_for_ever();
  zeros_.reset();
  for (std::size_t lane = 0; lane < reservations_.size(); ++lane) {
    if (is_stuck[lane]) continue;
    account_.add(Call::free, 1);
    store_->backend().free(reservations_[lane]);
  }
}

bool Space::unmap_all(Span& span) noexcept {
  bool is_all = !span.is_broken();
  try {
    std::vector<FrameId> frames;
    for (Pages page{}; page < span.mapped_end(); ++page) {
      // One call for all that stands side by side.
      const Pages first = page;
      std::uint32_t handles = 0;
      frames.clear();
      for (; span.mapped(page).is_mapped(); ++handles) {
        if (span[page].is_backed()) frames.push_back(span[page].frame);
        page = span.frame_of(page).last;
      }
      if (handles == 0) continue;
      account_.add(Call::unmap, handles);
      try {
        store_->backend().unmap({span.address_of(first), page_size() * (page - first).value},
                                handles);
        store_->give(frames);
      } catch (const Error&) {
        is_all = false;
      }
    }
  } catch (const std::bad_alloc&) {
    is_all = false;
  }
  return is_all;
}

Bytes Space::slot_bytes(std::size_t lane) const { return page_size() * slot_pages_[lane].value; }

Bytes Space::reserved_bytes() const {
  Bytes total{};
  for (const VirtualRange& range : reservations_) total += range.size;
  return total;
}

Tokens Space::whole_tokens(std::size_t lane, Pages pages) const {
  const Bytes bytes = size_of(pages, page_size());
  return Tokens(static_cast<std::int64_t>(bytes.value / layout_.lanes()[lane].token_bytes.value));
}

Bytes Space::byte_of(std::size_t lane, Tokens position) const {
  return layout_.lanes()[lane].token_bytes * static_cast<std::uint64_t>(position.value);
}

Pages Space::page_of(std::size_t lane, Tokens position) const {
  return Pages(static_cast<std::uint32_t>(byte_of(lane, position).value / page_size().value));
}

Pages Space::pages_for(std::size_t lane, Tokens n) const {
  return Pages(static_cast<std::uint32_t>(div_up(byte_of(lane, n).value, page_size().value)));
}

Pages Space::pages_with_overread(std::size_t lane, Tokens n) const {
  if (n == Tokens(0)) return Pages(0);
  return pages_for(lane, std::min(n, options_.max_seq_len) + options_.overread);
}

Pages Space::backed_pages(SlotId slot) const {
  Pages total{};
  for (std::size_t lane = 0; lane < n_lanes(); ++lane) total += span(slot, lane).backed_pages();
  return total;
}

bool Space::is_broken(SlotId slot) const {
  for (std::size_t lane = 0; lane < n_lanes(); ++lane) {
    if (span(slot, lane).is_broken()) return true;
  }
  return false;
}

bool Space::always_scrub(std::size_t lane) const {
  return options_.scrub == Scrub::reuse || !layout_.lanes()[lane].is_uniform;
}

void Space::back(Edit& edit, SlotId slot, std::size_t lane, PageRange range) {
  edit.back(span(slot, lane), range, owners_[lane], always_scrub(lane));
}

void Space::own(Edit& edit, SlotId slot, std::size_t lane, PageRange range, Bytes live) {
  edit.own(span(slot, lane), range, live, owners_[lane], always_scrub(lane));
}

void Space::place(Edit& edit, SlotId slot, std::size_t lane, std::span<const PageEntry> entries) {
  edit.place(span(slot, lane), Pages(0), entries, owners_[lane], always_scrub(lane));
}

}  // namespace kvspan
