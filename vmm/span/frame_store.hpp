// The frame store: where the frame pool's ids meet the backend's memory, under one budget. This is
// what the Python API calls a pool.
//
// A frame is created (given physical memory) when it is first taken, kept when it is given back,
// and taken again without a driver call; the background thread creates some before they are asked
// for. When frames run out, the store asks its reclaimers (the
// caches) to give up pages that no live token needs, re-balances the size classes, and only then
// says OutOfMemory.
//
// Threads: everything may be called from any thread. Taking and giving frames that exist is
// lock-free. `pressure_` is held while memory is being found for somebody; it comes before every
// lock that a reclaimer takes, so a reclaimer must not call `take` while it holds one of those.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "core/ids.hpp"
#include "pool/frame_pool.hpp"
#include "span/background.hpp"
#include "span/span.hpp"

namespace kvspan {

// Which of the pages that no live token needs are asked for.
enum class Reach : std::uint8_t {
  kept,    // those that are left from what is over, and that no work uses any more
  idle,    // also those that somebody is expected to use soon, and cached prefixes
  waited,  // also those that work still uses: it is waited for
};

// Somebody who holds frames that he can do without.
class Reclaimer {
 public:
  // Gives back about `wanted` pages, or what it has. Returns how many were given back. Must not
  // block on a caller of `take`.
  virtual Pages reclaim(Pages wanted, Reach reach) noexcept = 0;
  // The most that it could give back.
  virtual Pages reclaimable() const noexcept = 0;

 protected:
  ~Reclaimer() = default;
};

// Whose bytes a frame last held: a frame that changes owner is zeroed first (DESIGN rule 5).
using OwnerTag = Id<struct OwnerTagTag, std::uint32_t>;

// How hard `take` tries.
enum class Effort : std::uint8_t {
  kept,  // what is free, may be created, or is kept by reclaimers for nobody in particular
  all,   // also all else that they can do without
};

class FrameStore {
 public:
  struct Counts {
    Bytes capacity;
    Bytes in_use;   // frames that somebody references
    Bytes created;  // physical memory held, used or not
  };

  // A frame that was taken, and whether it holds bytes that its new owner must not see.
  struct Taken {
    FrameId frame;
    bool is_dirty = false;
  };

  // `ready`: how many bytes of free frames the background keeps created.
  // Throws InvalidArgument unless capacity is a positive multiple of the page size.
  FrameStore(std::unique_ptr<Backend> backend, Bytes capacity, SizeClass largest,
             Bytes ready = Bytes(0));

  Backend& backend() noexcept { return *backend_; }
  const Backend& backend() const noexcept { return *backend_; }
  Bytes page_size() const noexcept { return page_size_; }
  SizeClass largest_class() const noexcept { return pool_.largest_class(); }
  Background& background() noexcept { return background_; }
  OwnerTag new_owner() noexcept;

  // What a gap of unbacked pages is to be filled with.
  struct Gap {
    Pages pages;
    OwnerTag owner;
    bool always_scrub = false;  // what the owner itself left behind counts as dirty, too
  };

  // Takes the frames that cover every gap exactly, in order, largest frames first, created and with
  // one reference each, and appends them to `out`. All or nothing. Throws OutOfMemory.
  void take(std::span<const Gap> gaps, std::vector<Taken>& out, Effort effort = Effort::all);

  // Adds a reference to a frame that the caller already holds one of.
  void share(FrameId frame);
  // Takes a reference from each. Returns the pages that nobody references any more.
  Pages give(std::span<const FrameId> frames) noexcept;
  // Gives back what was taken and not used: what was dirty stays so, for whoever takes it next.
  void give_back(std::span<const Taken> taken) noexcept;
  // Takes a frame that the driver will not let go of out of circulation.
  void keep_for_ever(FrameId frame) noexcept { pool_.share({&frame, 1}); }
  std::uint32_t references(FrameId frame) const noexcept { return pool_.references(frame); }

  // Creates frames ahead, one page each, until `size` bytes of free ones exist. Throws OutOfMemory.
  void create_ahead(Bytes size);
  // Creates one of the frames that should be ready and are missing, within the budget. For the
  // background: a shortage is no error here.
  WorkDone keep_ready() noexcept;
  // Gives the memory of free frames back to the machine. Returns how much that was.
  Bytes trim();

  Counts counts() const noexcept;
  Bytes reclaimable() const noexcept;

  void add(Reclaimer* reclaimer);
  void remove(Reclaimer* reclaimer) noexcept;

 private:
  // What stands behind an id. Values from kFirstOwner on: present, last used by that owner.
  enum : std::uint32_t { kAbsent = 0, kClean = 1, kDirty = 2, kFirstOwner = 3 };
  using State = std::atomic<std::uint32_t>;

  State& state_of(FrameId frame) noexcept;
  enum class Breaking : std::uint8_t { no, yes };  // of frames that are larger than what is needed
  bool try_take(std::span<const Gap> gaps, std::vector<Taken>& out, Breaking breaking);
  bool try_take_or_not(std::span<const Gap> gaps, std::vector<Taken>& out);
  void take_class(SizeClass c, std::size_t n, std::vector<FrameId>& frames);
  void make_frames(SizeClass c, std::size_t n, std::vector<FrameId>& frames);
  std::size_t reserve_budget(SizeClass c, std::size_t n) noexcept;
  std::vector<FrameId> ids_without_memory(SizeClass c, std::size_t n);
  void put_aside(SizeClass c, std::span<const FrameId> ids);
  std::size_t frames_to_keep_ready(SizeClass c, Bytes& left) const noexcept;
  Pages release_free(Pages wanted);  // under pressure_
  void release(SizeClass c, std::span<const FrameId> frames);
  bool merge_two() noexcept;
  Bytes reclaimable_by_all() const noexcept;                 // under pressure_
  [[noreturn]] void throw_out_of_memory(Bytes asked) const;  // likewise

  const std::unique_ptr<Backend> backend_;
  const Bytes page_size_;
  const Pages capacity_;
  const Bytes ready_;
  FramePool pool_;
  std::vector<std::unique_ptr<State[]>> states_;  // one array a size class
  // Ids whose memory went back to the machine, by class. For the pool they are in use, so that what
  // it calls free has memory.
  std::mutex aside_mutex_;  // guards aside_
  std::array<std::vector<FrameId>, FrameId::kMaxClass + 1> aside_;
  std::array<std::atomic<std::uint64_t>, FrameId::kMaxClass + 1> n_aside_{};
  std::atomic<std::uint64_t> created_{0};  // pages with physical memory, never over capacity
  std::atomic<std::uint32_t> next_owner_{kFirstOwner};

  mutable std::mutex pressure_;  // guards reclaimers_, and admits one finder of memory at a time
  std::vector<Reclaimer*> reclaimers_;

  Background background_{*this};  // last: its thread ends before the rest goes
};

}  // namespace kvspan
