#include "cache/sequence.hpp"

#include "core/errors.hpp"

namespace kvspan {

Sequence::~Sequence() {
  try {
    release(state_->stream);
  } catch (const Error&) {
    // The slot stays taken: a fence that cannot be recorded is no proof that the work is done.
  }
}

void Sequence::extend(Tokens n, Stream stream) {
  cache_->check_usable();
  const Claimed claimed(*state_);
  cache_->extend(*state_, n, stream);
}

void Sequence::truncate(Tokens n, Stream stream) {
  cache_->check_usable();
  const Claimed claimed(*state_);
  cache_->truncate(*state_, n, stream);
}

void Sequence::drop_before(Tokens position, Stream stream) {
  cache_->check_usable();
  const Claimed claimed(*state_);
  cache_->drop_before(*state_, position, stream);
}

std::vector<std::shared_ptr<Sequence>> Sequence::fork(std::int32_t n, std::optional<Tokens> length,
                                                      Stream stream) {
  cache_->check_usable();
  const Claimed claimed(*state_);
  return cache_->fork(*state_, n, length.value_or(state_->tokens()), stream);
}

Tokens Sequence::publish(std::span<const std::int32_t> tokens, bool merges, Stream stream) {
  cache_->check_usable();
  const Claimed claimed(*state_);
  return cache_->publish(*state_, tokens, merges, stream);
}

void Sequence::release(Stream stream) {
  if (!cache_->store_->backend().usable())
    return;  // in a child of fork(2) there is nothing to free
  if (state_->claim_for_release()) cache_->release(*state_, stream);
}

SlotId Sequence::slot() const {
  cache_->check_usable();
  if (is_released())
    throw ReleasedError("a released sequence has no slot; take a new one with cache.sequence()");
  const std::scoped_lock lock(cache_->mutex_);
  return state_->slot;
}

}  // namespace kvspan
