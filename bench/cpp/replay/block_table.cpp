#include "replay/block_table.hpp"

namespace kvspan::bench {

bool BlockTable::extend(Id id, std::int64_t n) {
  std::int64_t& length = lengths_.at(id);
  const std::int64_t needed = blocks_of(length + n) - blocks_of(length);
  if (needed > n_free_) return false;
  n_free_ -= needed;
  n_used_blocks_ += needed;
  n_tokens_ += n;
  length += n;
  return true;
}

bool BlockTable::step(std::span<const Id> ids) {
  std::int64_t needed = 0;
  for (const Id id : ids) needed += lengths_.at(id) % block_tokens_ == 0;
  if (needed > n_free_) return false;
  for (const Id id : ids) extend(id, 1);
  return true;
}

void BlockTable::release(Id id) {
  const std::int64_t length = lengths_.at(id);
  n_free_ += blocks_of(length);
  n_used_blocks_ -= blocks_of(length);
  n_tokens_ -= length;
  lengths_.erase(id);
}

Held BlockTable::held() const {
  const double mapped = bytes(n_used_blocks_ * block_tokens_), used = bytes(n_tokens_);
  return {.mapped = mapped, .used = used, .partial = mapped - used};
}

}  // namespace kvspan::bench
