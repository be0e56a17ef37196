// Sequences from sequences: whole frames are shared, what the next token is written into is copied.
#include <algorithm>

#include "cache/cache.hpp"
#include "cache/claims.hpp"
#include "cache/sequence.hpp"
#include "core/errors.hpp"

namespace kvspan {

std::vector<std::shared_ptr<Sequence>> Cache::fork(SequenceState& parent, std::int32_t n,
                                                   Tokens length, Stream stream) {
  if (n < 1) throw InvalidArgument("fork makes 1 sequence or more, not " + std::to_string(n));
  if (length < Tokens(0) || length > parent.tokens()) {
    throw InvalidArgument("fork takes a length between 0 and the present one, " +
                          std::to_string(parent.tokens().value) + ", not " +
                          std::to_string(length.value));
  }
  if (const Tokens dropped(parent.dropped.load(std::memory_order_relaxed)); length < dropped) {
    throw InvalidArgument("cannot fork at " + std::to_string(length.value) +
                          " tokens: positions before " + std::to_string(dropped.value) +
                          " were dropped");
  }
  follow(parent, stream);
  const std::scoped_lock table(parent.table);
  std::vector<std::shared_ptr<SequenceState>> children;
  try {
    {
      const std::scoped_lock lock(mutex_);
      check_open();
      for (std::int32_t i = 0; i < n; ++i) children.push_back(occupy(emptiest_free_slot()));
    }
    // What their slots still have mapped makes way, and so do zeros.
    for (const auto& child : children) settle(child->slot);
    if (space_->has_windows()) store_->backend().wait(store_->backend().record_fence(stream));
    Edit edit = space_->edit(stream);
    for (const auto& child : children) {
      plan_copy(edit, parent.slot, parent.slot, child->slot, length);
    }
    commit(edit);
  } catch (...) {
    for (const auto& child : children) leave(*child);
    throw;
  }
  std::vector<std::shared_ptr<Sequence>> sequences;
  for (const auto& child : children) {
    {
      const std::scoped_lock lock(mutex_);
      begin_as(*child, parent, length, stream);
    }
    child->table.unlock();
    child->unclaim();
    sequences.push_back(std::make_shared<Sequence>(shared_from_this(), child));
  }
  return sequences;
}

void Cache::leave(SequenceState& state) noexcept {
  state.unclaim(Claim::released);
  vacate(state, slot(state.slot).fence);
  state.table.unlock();
}

void Cache::begin_as(SequenceState& state, SequenceState& parent, Tokens length, Stream stream) {
  state.is_branch = parent.is_branch = true;
  update_mapped(state.slot);
  state.dropped.store(parent.dropped.load(std::memory_order_relaxed), std::memory_order_relaxed);
  state.dropped_pages.store(parent.dropped_pages.load(std::memory_order_relaxed),
                            std::memory_order_relaxed);
  state.length.store(static_cast<std::int32_t>(length.value), std::memory_order_relaxed);
  state.mapped_ahead.store(0, std::memory_order_relaxed);
  state.stream = stream;
  state.salt = parent.salt;
  update_capacity(state);
}

void Cache::plan_copy(Edit& edit, SlotId from, SlotId from_after, SlotId to, Tokens length) {
  // Whole frames below the length are shared; the rest, the partly filled tail, is copied into
  // frames of its own, for that is where both will write.
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& source = space_->span(from, lane);
    Span& target = space_->span(to, lane);
    const Pages shared = source.narrowed({Pages(0), space_->page_of(lane, length)}).last;
    const Pages needed = space_->pages_with_overread(lane, length);

    std::vector<PageEntry> entries(std::max(needed, target.end()).value);
    for (Pages page{}; page < shared; ++page) entries[page.value] = source[page];
    for (Pages page = shared; page < needed; ++page) entries[page.value] = PageEntry::wanted();
    space_->place(edit, to, lane, entries);

    const Bytes tail = space_->byte_of(lane, length) - space_->page_size() * shared.value;
    if (tail > Bytes(0)) {
      edit.copy(target.address_of(shared), space_->span(from_after, lane).address_of(shared), tail);
    }
  }
}

void Cache::plan_move(Edit& edit, std::optional<SlotId> from, SlotId to) {
  for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
    const Span& target = space_->span(to, lane);
    std::vector<PageEntry> entries(target.end().value);
    if (from) {
      const Span& source = space_->span(*from, lane);
      entries.resize(std::max(source.end(), target.end()).value);
      for (Pages page{}; page < source.end(); ++page) entries[page.value] = source[page];
    }
    space_->place(edit, to, lane, entries);
  }
}

void Cache::reorder(std::span<const std::shared_ptr<Sequence>> sequences,
                    std::span<const std::int32_t> parents, Stream stream) {
  check_usable();
  if (sequences.empty() || parents.size() != sequences.size()) {
    throw InvalidArgument("reorder takes a parent for each sequence, not " +
                          std::to_string(parents.size()) + " for " +
                          std::to_string(sequences.size()));
  }
  for (const std::int32_t parent : parents) {
    if (parent < 0 || static_cast<std::size_t>(parent) >= sequences.size()) {
      throw InvalidArgument("reorder takes parents 0 to " + std::to_string(sequences.size() - 1) +
                            ", not " + std::to_string(parent));
    }
  }
  std::vector<SequenceState*> states;
  for (const auto& sequence : sequences) {
    if (sequence->cache().get() != this) {
      throw InvalidArgument("reorder takes sequences of this cache, and one is of another");
    }
    states.push_back(sequence->state().get());
  }
  auto sorted = states;
  std::ranges::sort(sorted);
  if (std::ranges::adjacent_find(sorted) != sorted.end()) {
    throw InvalidArgument("reorder takes each sequence once");
  }
  const Claims claims(states);
  std::vector<std::unique_lock<TableLock>> tables;
  for (SequenceState* state : sorted) tables.emplace_back(state->table);

  // Where a parent's own pages go: to itself if it goes on, else to its first child.
  std::vector<std::optional<std::size_t>> heir(states.size());
  for (std::size_t i = states.size(); i-- > 0;) heir[static_cast<std::size_t>(parents[i])] = i;
  bool is_any_changed = false;
  for (std::size_t i = 0; i < states.size(); ++i) {
    const bool stays = static_cast<std::size_t>(parents[i]) == i;
    if (stays) heir[i] = i;
    is_any_changed = is_any_changed || !stays;
  }
  if (!is_any_changed) return;

  // Remapping changes what is under addresses that kernels know: their work has to be done.
  Backend& backend = store_->backend();
  for (SequenceState* state : states) follow(*state, stream);
  backend.wait(backend.record_fence(stream));
  for (const SequenceState* state : states) settle(state->slot);
  Edit edit = space_->edit(stream);
  for (std::size_t i = 0; i < states.size(); ++i) {
    const auto parent = static_cast<std::size_t>(parents[i]);
    if (parent == i) continue;
    if (heir[parent] == i) {
      plan_move(edit, states[parent]->slot, states[i]->slot);
    } else {
      plan_copy(edit, states[parent]->slot, states[*heir[parent]]->slot, states[i]->slot,
                states[parent]->tokens());
      states[i]->is_branch = states[*heir[parent]]->is_branch = true;
    }
  }
  try {
    commit(edit);
  } catch (...) {
    for (SequenceState* state : states) state->is_lost = space_->is_broken(state->slot);
    throw;
  }
  struct Was {
    std::int32_t length, dropped;
    std::uint32_t dropped_pages;
    std::string salt;
  };
  std::vector<Was> was;
  for (const SequenceState* state : states) {
    was.push_back({state->length.load(std::memory_order_relaxed),
                   state->dropped.load(std::memory_order_relaxed),
                   state->dropped_pages.load(std::memory_order_relaxed), state->salt});
  }
  const std::scoped_lock lock(mutex_);
  for (std::size_t i = 0; i < states.size(); ++i) {
    const Was& parent = was[static_cast<std::size_t>(parents[i])];
    SequenceState& state = *states[i];
    state.length.store(parent.length, std::memory_order_relaxed);
    state.dropped.store(parent.dropped, std::memory_order_relaxed);
    state.dropped_pages.store(parent.dropped_pages, std::memory_order_relaxed);
    state.mapped_ahead.store(0, std::memory_order_relaxed);
    state.salt = parent.salt;
    state.stream = stream;
    update_mapped(state.slot);
    update_capacity(state);
  }
}

}  // namespace kvspan
