// The policies of other systems that page by virtual memory, as they describe them, under the same
// scheduler and with the same times of driver calls. Nothing of theirs is run here.
//
//   VAttention  microsoft/vattention, the paper (arXiv 2405.04437) and its allocator: all handles
//   of
//               2 MiB are created at the start; a block is one page of K and one of V, of all
//               layers
//               ("megacache") or of each; what a request leaves stays mapped in its slot until
//               memory is short, and is then taken whole, slot by slot from the highest. A thread
//               beside each step maps what the next one needs, and, until that is two blocks, what
//               the nine after this one do; a step waits for it. Without it, steps map.
//   Kvcached    ovg-project/kvcached, README and its page allocator: blocks of 16 tokens in pages
//   of
//               2 MiB a layer, for K and for V, which are one handle together ("compound") or each
//               one; a page goes when all its blocks do, but for 10 that are kept; a thread maps
//               some when fewer than 5 are; where nothing is, a zero page is mapped.
//   Naive       a page of all layers is created, mapped and granted when it is needed, and goes
//               when its request does; with `recycles`, its handle stays.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "replay/memory.hpp"

namespace kvspan::bench {

// What one token takes, and how the peers cut it up.
struct Shape {
  double token_bytes = 0;
  std::int64_t n_layers = 0, n_planes = 0;
  double capacity_bytes = 0;

  static constexpr double kPage = 2 << 20;
  double page_tokens(std::int64_t planes_a_page) const {  // of a page of so many planes of layers
    return kPage / (token_bytes / static_cast<double>(n_layers * n_planes) *
                    static_cast<double>(planes_a_page));
  }
};

// Counts calls, and what they take.
class CallCounter {
 public:
  // Calls about one handle each; pages_each: of 2 MiB.
  void add(DriverWork::Name name, std::int64_t n, std::int64_t pages_each = 1) {
    constexpr DriverTimes t;
    constexpr double microseconds[] = {t.create, t.map, t.set_access, t.unmap, t.release};
    work_.calls[name] += static_cast<std::uint64_t>(n);
    work_.seconds += static_cast<double>(n) * microseconds[name] * 1e-6;
    if (name == DriverWork::map) work_.pages_mapped += static_cast<double>(n * pages_each);
  }
  const DriverWork& work() const { return work_; }

 private:
  DriverWork work_;
};

class VAttention final : public Memory {
 public:
  VAttention(const Shape& shape, bool megacache, bool has_thread);

  void begin(Id id, std::int64_t prompt) override;
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override;
  double bytes_per_token() const override { return shape_.token_bytes; }
  Held held() const override;
  void run_background(double from, double until) override;
  DriverWork work() const override { return calls_.work(); }
  double clock() const override { return calls_.work().seconds + waited_; }

 private:
  static constexpr std::int64_t kLookahead = 9, kBlocksAhead = 2;
  struct Slot {
    std::int64_t length = 0, blocks = 0;
    bool is_used = false;
  };

  std::int64_t blocks_of(std::int64_t tokens) const;
  std::int64_t missing(const Slot& slot, std::int64_t tokens) const;
  bool grow(Slot& slot, std::int64_t tokens);
  bool reclaim(std::int64_t blocks);
  void look_ahead();

  const Shape shape_;
  const bool has_thread_;
  const std::int64_t pages_a_block_;
  const double block_tokens_;
  std::int64_t n_free_;      // blocks
  std::vector<Slot> slots_;  // as many as were ever used at once
  std::unordered_map<Id, std::size_t> slot_of_;
  CallCounter calls_;
  bool is_thread_due_ = false;
  double thread_until_ = 0, now_ = 0, waited_ = 0;
};

class Kvcached final : public Memory {
 public:
  Kvcached(const Shape& shape, bool compound);

  void begin(Id id, std::int64_t prompt) override;
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override;
  double bytes_per_token() const override { return shape_.token_bytes; }
  Held held() const override;
  void run_background(double from, double until) override;
  DriverWork work() const override { return calls_.work(); }

 private:
  static constexpr std::int64_t kBlock = 16, kLeastReserved = 5, kMostReserved = 10;
  struct Request {
    std::int64_t length = 0;
    std::vector<std::size_t> pages;  // of each of its blocks
  };

  bool take_blocks(Request& request, std::int64_t n);
  std::int64_t free_blocks() const;
  std::size_t map_page();
  void unmap_page(std::size_t page);

  const Shape shape_;
  const std::int64_t layers_;   // of a page, K and V apart
  const std::int64_t handles_;  // of a page
  const std::int64_t blocks_a_page_;
  const std::int64_t n_pages_;
  std::int64_t n_mapped_ = 0, n_tokens_ = 0, n_blocks_ = 0;
  std::vector<std::size_t> reserved_;                // mapped, no block in use
  std::vector<std::size_t> unmapped_;                // numbers of pages
  std::map<std::size_t, std::int64_t> partly_free_;  // page, and its free blocks
  std::vector<std::int64_t> used_;                   // blocks, by page
  std::unordered_map<Id, Request> requests_;
  CallCounter calls_;
  bool is_thread_due_ = false;
  double thread_until_ = 0;
};

class Naive final : public Memory {
 public:
  Naive(const Shape& shape, bool recycles);

  void begin(Id id, std::int64_t) override { lengths_[id] = 0; }
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override;
  double bytes_per_token() const override { return shape_.token_bytes; }
  Held held() const override;
  void run_background(double, double) override {}
  DriverWork work() const override { return calls_.work(); }

 private:
  std::int64_t pages_of(std::int64_t tokens) const;

  const Shape shape_;
  const bool recycles_;
  const double page_tokens_;
  std::int64_t n_free_, n_created_ = 0, n_used_ = 0, n_tokens_ = 0;
  std::unordered_map<Id, std::int64_t> lengths_;
  CallCounter calls_;
};

}  // namespace kvspan::bench
