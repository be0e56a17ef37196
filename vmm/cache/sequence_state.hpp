// What a cache knows of one sequence, and the claim by which one thread at a time works on it.
//
// The claim is a flag, not a lock: a second thread that finds it set gets BusyError, for two
// threads on one sequence are a mistake of the caller's. Only reclamation, which the caller cannot
// see, is waited for; it never blocks while it holds a claim.
//
// The page tables of the slot have a lock of their own, for the mapper adds pages while the
// sequence is in use: a step that finds room takes no notice of it. Order: a claim, then the
// table's lock, then the cache's mutex; whoever holds the mutex only tries the other two.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

#include "backend/backend.hpp"
#include "cache/pace.hpp"
#include "core/errors.hpp"
#include "core/ids.hpp"

namespace kvspan {

// A lock of one byte, held for microseconds: as long as the driver maps a page or two.
class TableLock {
 public:
  // Acquire and release: the next holder sees the tables as the last one left them.
  bool try_lock() noexcept { return !is_held_.exchange(true, std::memory_order_acquire); }
  void lock() noexcept {
    while (!try_lock()) std::this_thread::yield();
  }
  void unlock() noexcept { is_held_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> is_held_{false};
};

enum class Claim : std::uint8_t {
  idle,
  used,       // by a call of the API
  reclaimed,  // its surplus pages are being taken
  released,   // for good
  closed,     // for good, by closing the cache
  lost,       // for good: the driver failed while a change was being undone
};

struct alignas(64) SequenceState {
  std::atomic<Claim> claim{Claim::idle};
  TableLock table;         // guards the spans of the slot, and
  bool is_branch = false;  // whether it was forked, or is a fork: likely to be forked (again)
  SlotId slot;             // changes only under a claim, the table's lock and the cache's mutex
  // Written under a claim, read by anybody (relaxed: they publish nothing but themselves).
  std::atomic<std::int32_t> length{0};
  // Up to here tokens fit without any work. Written under the table's lock, with release: who reads
  // it with acquire finds the pages mapped.
  std::atomic<std::int32_t> capacity{0};
  std::atomic<std::int32_t> dropped{0};  // positions before it are gone in lanes with a window
  std::atomic<std::uint32_t> dropped_pages{0};  // the pages that this unbacked, all lanes
  std::atomic<std::int32_t> announced{0};       // tokens to come; relaxed: a hint to the mapper
  // What the mapper, or a stride, has mapped ahead of need ends here; 0: nothing was.
  std::atomic<std::int32_t> mapped_ahead{0};
  std::atomic<bool> is_lost{false};  // the next unclaim makes it Claim::lost
  Pace pace;                         // the mapper's alone
  // Under a claim. Behind the work of the slot's last sequence; streams that work here follow it.
  Fence predecessor;
  Stream stream;     // under a claim: the last one that worked here
  std::string salt;  // under a claim: which of the prefix index's chains are its own

  Tokens tokens() const { return Tokens(length.load(std::memory_order_relaxed)); }

  // Acquire: what the last owner did to the slot's spans happens before what the next one does.
  bool try_claim(Claim as) noexcept {
    Claim expected = Claim::idle;
    return claim.compare_exchange_strong(expected, as, std::memory_order_acquire,
                                         std::memory_order_relaxed);
  }

  void claim_or_throw() {
    while (!try_claim(Claim::used)) {
      switch (claim.load(std::memory_order_relaxed)) {
        case Claim::idle:
        case Claim::reclaimed:
          std::this_thread::yield();
          break;
        case Claim::used:
          throw BusyError(
              "another thread is inside a call on this sequence; a sequence is one thread's at a "
              "time: give each thread its own, or guard it with a lock");
        case Claim::released:
          throw ReleasedError("this sequence was released; take a new one with cache.sequence()");
        case Claim::closed:
          throw ReleasedError("the cache of this sequence was closed");
        case Claim::lost:
          throw DriverError("remap", "lost",
                            "the driver failed while a change to this sequence was being undone; "
                            "its tokens are lost: release it and compute them again");
      }
    }
  }

  // Release: pairs with the acquire of the next claim.
  void unclaim(Claim to = Claim::idle) noexcept { claim.store(to, std::memory_order_release); }

  // As above, but a lost sequence may be claimed, too. Returns false when it is released already.
  bool claim_for_release() {
    Claim lost = Claim::lost;
    if (claim.compare_exchange_strong(lost, Claim::used, std::memory_order_acquire)) return true;
    if (is_released()) return false;
    claim_or_throw();
    return true;
  }

  bool is_released() const noexcept {
    const Claim now = claim.load(std::memory_order_relaxed);
    return now == Claim::released || now == Claim::closed;
  }
};

// A claim for as long as a block lasts.
class Claimed {
 public:
  explicit Claimed(SequenceState& state) : state_(state) { state_.claim_or_throw(); }
  Claimed(const Claimed&) = delete;
  Claimed& operator=(const Claimed&) = delete;
  ~Claimed() { state_.unclaim(state_.is_lost ? Claim::lost : after_); }

  // The state in which the block leaves the sequence.
  void leave_as(Claim after) { after_ = after; }

 private:
  SequenceState& state_;
  Claim after_ = Claim::idle;
};

}  // namespace kvspan
