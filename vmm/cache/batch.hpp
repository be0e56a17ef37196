// A batch: rows of sequences that decode together. `step` gives every row one more token in one
// call that, as long as nobody crosses into an unmapped page, is a few integer operations a row.
//
// Lengths and slots live in int32 arrays on the device, at fixed addresses, for tensors and
// captured graphs; on a GPU they are brought up to date on the stream of the call that changes
// them. In a batch of adjacent slots row i is slot first + i, so kernels that want their rows side
// by side get a view; `select` permutes, repeats and drops rows by remapping pages.
//
// Threads: a batch is one thread's at a time, like the sequences in it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache/cache.hpp"
#include "cache/sequence.hpp"

namespace kvspan {

// Adjacent slots that a batch holds, whether sequences live in them or not.
struct SlotLease {
  SlotId first;
  std::int32_t count;
};

// What the tensors of a batch show; they share its ownership. Three arrays of as many rows in one
// mirror.
class BatchArrays {
 public:
  BatchArrays(Backend& backend, std::size_t n_rows);

  enum class Which : std::uint8_t {
    before,   // lengths before the last step
    lengths,  // lengths now
    slots,
  };
  std::span<std::int32_t> host(Which which) noexcept;
  Address device(Which which) const noexcept;
  const Traits& traits() const noexcept { return traits_; }
  void publish(Stream stream) { mirror_->publish(stream); }

 private:
  const Traits traits_;
  const std::size_t n_rows_;
  const std::unique_ptr<Mirror> mirror_;
};

class Batch {
 public:
  // Throws InvalidArgument when a sequence is repeated or of another cache.
  Batch(std::shared_ptr<Cache> cache, std::vector<std::shared_ptr<Sequence>> rows, Stream stream,
        std::optional<SlotLease> lease = std::nullopt);
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;
  ~Batch();

  // Every row grows by n tokens, or none does. Afterwards `before` holds the lengths before.
  void step(Tokens n, Stream stream);

  // Row i becomes what row rows[i] was. Rows that are named again share pages with the first, as a
  // fork does; rows that are not named are released. Only for adjacent slots.
  void select(std::span<const std::int32_t> rows, Stream stream);

  // A batch in as many adjacent slots whose rows have the tokens of these, as forks: all or none.
  // Only for adjacent slots.
  std::shared_ptr<Batch> fork(Stream stream);

  // Brings `lengths` and `slots` up to date with what was done to the sequences by themselves.
  void refresh(Stream stream);

  std::size_t size() const { return rows_.size(); }
  const std::vector<std::shared_ptr<Sequence>>& rows() const { return rows_; }
  const std::optional<SlotLease>& lease() const { return lease_; }
  const std::shared_ptr<BatchArrays>& arrays() const { return arrays_; }
  const std::shared_ptr<Cache>& cache() const { return cache_; }

 private:
  const std::shared_ptr<Cache> cache_;
  std::vector<std::shared_ptr<Sequence>> rows_;
  std::vector<SequenceState*> states_;  // of rows_, for the fast path
  const std::optional<SlotLease> lease_;
  bool is_stale_ = true;                 // what could not be published is tried again
  std::shared_ptr<BatchArrays> arrays_;  // of as many rows as the batch was made with
};

}  // namespace kvspan
