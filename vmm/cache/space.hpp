// The address space of one cache: a reservation per lane, and in it a span per slot. It knows how
// tokens fall onto pages; it knows nothing of sequences.
//
// Tensors share its ownership, so the memory they show outlives the cache: the last owner unmaps
// everything and gives the frames back. Threads: the spans of a slot belong to whoever owns the
// slot; everything else is constant.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.hpp"
#include "cache/layout.hpp"
#include "span/edit.hpp"
#include "span/frame_store.hpp"
#include "span/span.hpp"
#include "span/zeros.hpp"

namespace kvspan {

enum class Scrub : std::uint8_t {
  cross,  // frames that last held another cache's or dtype's bytes are zeroed
  reuse,  // and so is whatever another sequence left behind
};

struct SpaceOptions {
  std::int32_t n_slots;
  Tokens max_seq_len;
  Tokens overread;  // positions past a length that stay mapped, for kernels that read in tiles
  Unmapped unmapped;
  Tokens static_len;  // positions of a slot that read as zeros where a device maps them for that
  Scrub scrub;
};

class Space {
 public:
  Space(std::shared_ptr<FrameStore> store, Layout layout, const SpaceOptions& options);
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
  ~Space();

  FrameStore& store() const { return *store_; }
  const Layout& layout() const { return layout_; }
  const SpaceOptions& options() const { return options_; }
  std::size_t n_lanes() const { return layout_.lanes().size(); }
  Bytes page_size() const { return store_->page_size(); }
  CallCounters& account() { return account_; }

  Span& span(SlotId slot, std::size_t lane) {
    return spans_[static_cast<std::size_t>(slot.value) * n_lanes() + lane];
  }
  const Span& span(SlotId slot, std::size_t lane) const {
    return const_cast<Space*>(this)->span(slot, lane);
  }

  // Addresses and sizes, for tensors.
  Address lane_base(std::size_t lane) const { return reservations_[lane].base; }
  Bytes slot_bytes(std::size_t lane) const;
  Bytes reserved_bytes() const;
  // The frames of zeros that stand where nothing is backed; 0 where that takes no frames.
  Bytes zero_bytes() const { return zeros_ ? zeros_->size() : Bytes(0); }

  // The byte in a lane at which a position starts, and pages in terms of positions: the page that
  // holds it, and how many pages `n` positions need from the start, those read ahead included or
  // not.
  Bytes byte_of(std::size_t lane, Tokens position) const;
  Pages page_of(std::size_t lane, Tokens position) const;
  Pages pages_for(std::size_t lane, Tokens n) const;
  // How many tokens lie whole in the first so many pages.
  Tokens whole_tokens(std::size_t lane, Pages pages) const;
  Pages pages_with_overread(std::size_t lane, Tokens n) const;

  Pages backed_pages(SlotId slot) const;
  bool is_broken(SlotId slot) const;

  // Whether kernels may be reading what is mapped in parts of a slot that no token needs.
  bool has_windows() const { return zeros_ != nullptr; }

  // Whether the frame behind a page is also mapped elsewhere.
  bool is_shared(const Span& span, Pages page) const {
    return store_->references(span[page].frame) > 1;
  }

  // Whether something has to make way before a sequence may write to this page.
  bool is_in_the_way(const Span& span, Pages page) const {
    return span.mapped(page).is_zeros() || (span[page].is_backed() && is_shared(span, page));
  }

  Edit edit(Stream stream) { return {*store_, account_, stream}; }
  void back(Edit& edit, SlotId slot, std::size_t lane, PageRange range);
  void own(Edit& edit, SlotId slot, std::size_t lane, PageRange range, Bytes live);
  void place(Edit& edit, SlotId slot, std::size_t lane, std::span<const PageEntry> entries);

 private:
  void reserve();
  void show_zeros();
  void take_down() noexcept;
  bool unmap_all(Span& span) noexcept;
  Pages window_of(std::size_t lane) const;
  bool always_scrub(std::size_t lane) const;

  const std::shared_ptr<FrameStore> store_;
  const Layout layout_;
  const SpaceOptions options_;
  CallCounters account_;
  std::vector<OwnerTag> owners_;            // one a lane
  std::vector<Pages> slot_pages_;           // one a lane
  std::vector<VirtualRange> reservations_;  // one a lane
  std::unique_ptr<Zeros> zeros_;            // none where the device has zeros of its own
  std::vector<Span> spans_;                 // [slot][lane]
};

}  // namespace kvspan
