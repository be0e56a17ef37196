#include "cache/batch.hpp"

#include <algorithm>

#include "cache/claims.hpp"
#include "core/errors.hpp"

namespace kvspan {

using Which = BatchArrays::Which;

BatchArrays::BatchArrays(Backend& backend, std::size_t n_rows)
    : traits_(backend.traits()),
      n_rows_(n_rows),
      mirror_(backend.make_mirror(Bytes(3 * n_rows * sizeof(std::int32_t)))) {}

std::span<std::int32_t> BatchArrays::host(Which which) noexcept {
  return {static_cast<std::int32_t*>(mirror_->host()) + static_cast<std::size_t>(which) * n_rows_,
          n_rows_};
}

Address BatchArrays::device(Which which) const noexcept {
  return mirror_->device() +
         Bytes(static_cast<std::size_t>(which) * n_rows_ * sizeof(std::int32_t));
}

Batch::Batch(std::shared_ptr<Cache> cache, std::vector<std::shared_ptr<Sequence>> rows,
             Stream stream, std::optional<SlotLease> lease)
    : cache_(std::move(cache)), rows_(std::move(rows)), lease_(lease) {
  if (rows_.empty()) throw InvalidArgument("a batch has at least one row");
  for (const auto& row : rows_) {
    if (row->cache() != cache_) {
      throw InvalidArgument("a sequence of another cache cannot be a row of this cache's batch");
    }
    states_.push_back(row->state().get());
  }
  std::vector<SequenceState*> sorted = states_;
  std::ranges::sort(sorted);
  if (std::ranges::adjacent_find(sorted) != sorted.end()) {
    throw InvalidArgument("a sequence is in the batch twice; fork() it to decode it twice");
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i]->is_released()) {
      throw ReleasedError("row " + std::to_string(i) +
                          " is a sequence that was released; leave it out");
    }
  }
  // Behind the checks: on a GPU this is device memory.
  arrays_ = std::make_shared<BatchArrays>(cache_->store_->backend(), rows_.size());
  refresh(stream);
}

Batch::~Batch() {
  if (!lease_ || !cache_->store_->backend().usable()) return;
  const std::scoped_lock lock(cache_->mutex_);
  for (std::int32_t i = 0; i < lease_->count; ++i) {
    const SlotId id(lease_->first.value + i);
    cache_->slot(id).is_leased = false;
    if (cache_->space_) cache_->update_mapped(id);  // a slot that a select broke is retired
  }
}

void Batch::step(Tokens n, Stream stream) {
  cache_->check_usable();
  if (n < Tokens(1)) {
    throw InvalidArgument("step takes 1 token or more, not " + std::to_string(n.value));
  }
  const Claims claims(states_);
  bool has_room = true;
  for (const SequenceState* state : states_) {
    const std::int64_t grown = state->length.load(std::memory_order_relaxed) + n.value;
    has_room = has_room && grown <= state->capacity.load(std::memory_order_acquire);
  }
  if (!has_room) {
    const Tokens longest = cache_->space_->options().max_seq_len;
    for (std::size_t i = 0; i < states_.size(); ++i) {
      if (n <= longest - states_[i]->tokens()) continue;
      throw CapacityError(
          "row " + std::to_string(i) + " has " + std::to_string(states_[i]->tokens().value) +
          " tokens and cannot grow by " + std::to_string(n.value) + ": max_seq_len is " +
          std::to_string(longest.value) + "; take the row out of the batch");
    }
    cache_->grow(states_, n, stream);
  }
  const auto grow_by = static_cast<std::int32_t>(n.value);
  const auto before = arrays_->host(Which::before);
  const auto lengths = arrays_->host(Which::lengths);
  for (std::size_t i = 0; i < states_.size(); ++i) {
    cache_->follow(*states_[i], stream);
    before[i] = states_[i]->length.load(std::memory_order_relaxed);
    lengths[i] = before[i] + grow_by;
  }
  arrays_->publish(stream);
  for (std::size_t i = 0; i < states_.size(); ++i) {
    states_[i]->length.store(lengths[i], std::memory_order_relaxed);
  }
  if (!has_room) cache_->note_grown(states_);
}

void Batch::refresh(Stream stream) {
  cache_->check_usable();
  const auto lengths = arrays_->host(Which::lengths);
  const auto slots = arrays_->host(Which::slots);
  {
    const std::scoped_lock lock(cache_->mutex_);
    for (std::size_t i = 0; i < states_.size(); ++i) {
      const std::int32_t length = states_[i]->length.load(std::memory_order_relaxed);
      const std::int32_t slot = states_[i]->slot.value;
      is_stale_ = is_stale_ || lengths[i] != length || slots[i] != slot;
      lengths[i] = length;
      slots[i] = slot;
    }
  }
  if (!is_stale_) return;
  arrays_->publish(stream);
  is_stale_ = false;
}

void Batch::select(std::span<const std::int32_t> rows, Stream stream) {
  cache_->check_usable();
  if (!lease_) {
    throw InvalidArgument(
        "select needs rows in adjacent slots: make the batch with cache.batch(n), not from a list");
  }
  if (rows.empty() || rows.size() > static_cast<std::size_t>(lease_->count)) {
    throw InvalidArgument("select takes 1 to " + std::to_string(lease_->count) +
                          " rows (the slots of this batch), not " + std::to_string(rows.size()));
  }
  for (const std::int32_t row : rows) {
    if (row < 0 || static_cast<std::size_t>(row) >= rows_.size()) {
      throw InvalidArgument("select takes rows 0 to " + std::to_string(rows_.size() - 1) +
                            ", not " + std::to_string(row));
    }
  }
  Cache& cache = *cache_;
  Space& space = *cache.space();
  const auto slot_of = [&](std::size_t row) {
    return SlotId(lease_->first.value + static_cast<std::int32_t>(row));
  };

  // Rows that stay are claimed; what is dropped may have been released by its owner already.
  std::vector<std::optional<std::size_t>> first_use(rows_.size());
  for (std::size_t i = rows.size(); i-- > 0;) first_use[static_cast<std::size_t>(rows[i])] = i;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (static_cast<std::size_t>(rows[i]) == i) first_use[i] = i;  // what stays is not remapped
  }
  std::vector<SequenceState*> claimed;
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (first_use[row] || !rows_[row]->is_released()) claimed.push_back(states_[row]);
  }
  const auto old_rows = rows_;  // whose states outlive the claims
  const Claims claims(claimed);
  std::vector<std::unique_lock<TableLock>> tables;
  for (SequenceState* state : claimed) tables.emplace_back(state->table);

  // Remapping changes what is under addresses that kernels know: their work has to be done.
  Backend& backend = cache.store_->backend();
  backend.wait(backend.record_fence(stream));
  for (std::int32_t i = 0; i < lease_->count; ++i) {
    const SlotId id(lease_->first.value + i);
    if (space.is_broken(id)) {
      throw DriverError("remap", "lost",
                        "the driver failed on slot " + std::to_string(id.value) +
                            " of this batch; make a new batch");
    }
    cache.settle(id);
  }

  std::vector<std::shared_ptr<Sequence>> selected;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto row = static_cast<std::size_t>(rows[i]);
    if (first_use[row] == i) {
      selected.push_back(rows_[row]);
      continue;
    }
    auto state = std::make_shared<SequenceState>();
    state->claim.store(Claim::closed, std::memory_order_relaxed);  // owns nothing to release yet
    selected.push_back(std::make_shared<Sequence>(cache_, std::move(state)));
  }
  std::vector<SequenceState*> selected_states;
  for (const auto& sequence : selected) selected_states.push_back(sequence->state().get());

  Edit edit = space.edit(stream);
  for (std::size_t i = 0; i < static_cast<std::size_t>(lease_->count); ++i) {
    const SlotId to = slot_of(i);
    const std::size_t row = i < rows.size() ? static_cast<std::size_t>(rows[i]) : rows_.size();
    if (i < rows.size() && first_use[row] != i) {
      cache.plan_copy(edit, slot_of(row), slot_of(*first_use[row]), to, states_[row]->tokens());
      continue;
    }
    // Moved whole, surplus pages and all; or emptied.
    std::optional<SlotId> from;
    if (i < rows.size()) from = slot_of(row);
    cache.plan_move(edit, from, to);
  }
  try {
    cache.commit(edit);
  } catch (...) {
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      states_[row]->is_lost = space.is_broken(slot_of(row));
    }
    throw;
  }

  {
    const std::scoped_lock lock(cache.mutex_);
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      cache.slot(slot_of(row)).live.reset();
      if (!first_use[row]) states_[row]->unclaim(Claim::released);
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
      SequenceState& state = *selected_states[i];
      SequenceState& source = *states_[static_cast<std::size_t>(rows[i])];
      state.slot = slot_of(i);
      state.stream = stream;
      state.length.store(source.length.load(std::memory_order_relaxed), std::memory_order_relaxed);
      state.dropped.store(source.dropped.load(std::memory_order_relaxed),
                          std::memory_order_relaxed);
      state.dropped_pages.store(source.dropped_pages.load(std::memory_order_relaxed),
                                std::memory_order_relaxed);
      if (&state != &source) {
        state.salt = source.salt;
        state.is_branch = source.is_branch = true;
      }
      cache.slot(state.slot).live = selected[i]->state();
      // From here on close() waits for it; one that is under way does not know it.
      const bool is_new = first_use[static_cast<std::size_t>(rows[i])] != i;
      if (is_new && !cache.is_closed_) state.claim.store(Claim::used, std::memory_order_relaxed);
    }
    for (std::int32_t i = 0; i < lease_->count; ++i) {
      cache.update_mapped(SlotId(lease_->first.value + i));
    }
    for (SequenceState* state : selected_states) cache.update_capacity(*state);
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const bool is_new = first_use[static_cast<std::size_t>(rows[i])] != i;
    const bool is_used = selected_states[i]->claim.load(std::memory_order_relaxed) == Claim::used;
    if (is_new && is_used) selected_states[i]->unclaim();
  }
  tables.clear();  // before the rows that go are gone
  rows_ = std::move(selected);
  states_ = std::move(selected_states);
  refresh(stream);
}

std::shared_ptr<Batch> Batch::fork(Stream stream) {
  cache_->check_usable();
  if (!lease_) {
    throw InvalidArgument(
        "fork needs rows in adjacent slots: make the batch with cache.batch(n), or fork() each "
        "sequence");
  }
  Cache& cache = *cache_;
  Space& space = *cache.space();
  Backend& backend = cache.store_->backend();
  const std::shared_ptr<Batch> child = cache.adjacent_batch(lease_->count, stream);
  {
    const Claims claims(states_);
    const Claims child_claims(child->states_);
    std::vector<std::unique_lock<TableLock>> tables;
    for (SequenceState* state : states_) tables.emplace_back(state->table);
    for (SequenceState* state : child->states_) tables.emplace_back(state->table);

    for (SequenceState* state : states_) cache.follow(*state, stream);
    for (SequenceState* state : child->states_) {
      cache.settle(state->slot);
      // What the slot kept makes way at once: its frames may be those that are wanted.
      const std::scoped_lock lock(cache.mutex_);
      cache.drop_tail(state->slot, Tokens(0));
    }
    if (space.has_windows()) backend.wait(backend.record_fence(stream));
    Edit edit = space.edit(stream);
    for (std::size_t row = 0; row < states_.size(); ++row) {
      const SlotId from = states_[row]->slot;
      cache.plan_copy(edit, from, from, child->states_[row]->slot, states_[row]->tokens());
    }
    try {
      cache.commit(edit);
    } catch (...) {
      for (SequenceState* state : child->states_) state->is_lost = space.is_broken(state->slot);
      throw;
    }
    const std::scoped_lock lock(cache.mutex_);
    for (std::size_t row = 0; row < states_.size(); ++row) {
      SequenceState& source = *states_[row];
      cache.begin_as(*child->states_[row], source, source.tokens(), stream);
    }
  }
  // What a select has left of these slots is left of those, too.
  child->rows_.resize(rows_.size());
  child->states_.resize(states_.size());
  child->is_stale_ = true;
  child->refresh(stream);
  return child;
}

}  // namespace kvspan
