#include "replay/peers.hpp"

#include <algorithm>
#include <cmath>

namespace kvspan::bench {

namespace {

std::int64_t divided_up(std::int64_t tokens, double tokens_each) {
  return static_cast<std::int64_t>(std::ceil(static_cast<double>(tokens) / tokens_each));
}

}  // namespace

// ---- vAttention ----

VAttention::VAttention(const Shape& shape, std::int64_t max_seqs, bool megacache)
    : shape_(shape),
      pages_a_block_(shape.n_planes * (megacache ? 1 : shape.n_layers)),
      block_tokens_(shape.page_tokens(megacache ? shape.n_layers : 1)),
      n_free_(static_cast<std::int64_t>(shape.capacity_bytes / Shape::kPage) / pages_a_block_),
      slots_(static_cast<std::size_t>(max_seqs)) {}

std::int64_t VAttention::blocks_of(std::int64_t tokens) const {
  return divided_up(tokens, block_tokens_);
}

void VAttention::begin(Id id, std::int64_t prompt) {
  // The least that holds the prompt, else the most there is.
  const std::int64_t wanted = blocks_of(prompt);
  std::size_t best = slots_.size();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].is_used) continue;
    if (best == slots_.size()) best = i;
    const std::int64_t has = slots_[i].blocks, had = slots_[best].blocks;
    const bool fits_better = has >= wanted && (had < wanted || has < had);
    if (fits_better || (had < wanted && has > had)) best = i;
  }
  slots_.at(best).is_used = true;
  n_kept_ -= slots_[best].blocks;
  kept_in_.erase(best);
  slot_of_[id] = best;
}

bool VAttention::reclaim(std::int64_t blocks) {
  while (n_free_ < blocks && !kept_in_.empty()) {
    const std::size_t highest = *kept_in_.rbegin();
    Slot& slot = slots_[highest];
    const std::int64_t n = std::min(slot.blocks, blocks - n_free_);
    calls_.add(DriverWork::unmap, n * pages_a_block_);
    slot.blocks -= n;
    n_kept_ -= n;
    n_free_ += n;
    if (slot.blocks == 0) kept_in_.erase(highest);
  }
  return n_free_ >= blocks;
}

bool VAttention::grow(Slot& slot, std::int64_t tokens) {
  const std::int64_t n = blocks_of(tokens) - slot.blocks;
  if (n <= 0) return true;
  if (!reclaim(n)) return false;
  n_free_ -= n;
  slot.blocks += n;
  calls_.add(DriverWork::map, n * pages_a_block_);
  calls_.add(DriverWork::set_access, n * pages_a_block_);
  return true;
}

bool VAttention::extend(Id id, std::int64_t n) {
  Slot& slot = slots_[slot_of_.at(id)];
  if (!grow(slot, slot.length + n)) return false;
  slot.length += n;
  return true;
}

bool VAttention::step(std::span<const Id> ids) {
  for (const Id id : ids) {
    Slot& slot = slots_[slot_of_.at(id)];
    if (!grow(slot, slot.length + 1)) return false;
  }
  for (const Id id : ids) ++slots_[slot_of_.at(id)].length;
  return true;
}

void VAttention::run_background(double from, double until) {
  const double end = calls_.work().seconds + until - from;
  for (auto& [id, i] : slot_of_) {
    if (calls_.work().seconds >= end) return;
    if (slots_[i].length > 0) grow(slots_[i], slots_[i].length + kLookahead);
  }
}

void VAttention::release(Id id) {
  Slot& slot = slots_[slot_of_.at(id)];
  slot.is_used = false;
  slot.length = 0;
  n_kept_ += slot.blocks;
  if (slot.blocks > 0) kept_in_.insert(slot_of_.at(id));
  slot_of_.erase(id);
}

double VAttention::available_bytes() const {
  std::int64_t blocks = n_free_ + n_kept_;
  for (const auto& [id, i] : slot_of_) {
    blocks +=
        std::max<std::int64_t>(slots_[i].blocks - blocks_of(slots_[i].length + kLookahead), 0);
  }
  return static_cast<double>(blocks) * block_tokens_ * shape_.token_bytes;
}

Held VAttention::held() const {
  const double block_bytes = static_cast<double>(pages_a_block_) * Shape::kPage;
  Held held;
  held.kept = static_cast<double>(n_kept_) * block_bytes;
  held.mapped = held.kept;
  for (const auto& [id, i] : slot_of_) {
    const double mapped = static_cast<double>(slots_[i].blocks) * block_bytes;
    const double used = static_cast<double>(slots_[i].length) * shape_.token_bytes;
    held.mapped += mapped;
    held.used += used;
    held.partial += mapped - used;
  }
  return held;
}

// ---- kvcached ----

Kvcached::Kvcached(const Shape& shape)
    : shape_(shape),
      handles_(shape.n_layers * shape.n_planes),
      blocks_a_page_(static_cast<std::int64_t>(shape.page_tokens(1)) / kBlock),
      n_pages_(static_cast<std::int64_t>(shape.capacity_bytes / Shape::kPage) / handles_),
      used_(static_cast<std::size_t>(n_pages_)) {
  for (std::size_t i = used_.size(); i-- > 0;) unmapped_.push_back(i);
}

void Kvcached::begin(Id id, std::int64_t) { requests_[id] = {}; }

bool Kvcached::take_blocks(Request& request, std::int64_t n) {
  std::int64_t n_free =
      blocks_a_page_ * static_cast<std::int64_t>(reserved_.size() + unmapped_.size());
  for (const auto& [page, free] : partly_free_) n_free += free;
  if (n > n_free) return false;
  for (; n > 0; --n) {
    if (partly_free_.empty()) {
      std::size_t page = 0;
      if (!reserved_.empty()) {
        page = reserved_.back();
        reserved_.pop_back();
      } else {
        page = unmapped_.back();
        unmapped_.pop_back();
        ++n_mapped_;
        for (const auto name :
             {DriverWork::unmap, DriverWork::create, DriverWork::map, DriverWork::set_access}) {
          calls_.add(name, handles_);
        }
      }
      partly_free_[page] = blocks_a_page_;
    }
    const auto first = partly_free_.begin();
    request.pages.push_back(first->first);
    ++used_[first->first];
    ++n_blocks_;
    if (--first->second == 0) partly_free_.erase(first);
  }
  return true;
}

bool Kvcached::extend(Id id, std::int64_t n) {
  Request& request = requests_.at(id);
  const std::int64_t needed =
      (request.length + n + kBlock - 1) / kBlock - static_cast<std::int64_t>(request.pages.size());
  if (needed > 0 && !take_blocks(request, needed)) return false;
  request.length += n;
  n_tokens_ += n;
  return true;
}

bool Kvcached::step(std::span<const Id> ids) {
  std::int64_t needed = 0;
  for (const Id id : ids) needed += requests_.at(id).length % kBlock == 0;
  std::int64_t n_free =
      blocks_a_page_ * static_cast<std::int64_t>(reserved_.size() + unmapped_.size());
  for (const auto& [page, free] : partly_free_) n_free += free;
  if (needed > n_free) return false;
  for (const Id id : ids) extend(id, 1);
  return true;
}

void Kvcached::release(Id id) {
  for (const std::size_t page : requests_.at(id).pages) {
    --n_blocks_;
    if (--used_[page] > 0) {
      ++partly_free_[page];
      continue;
    }
    partly_free_.erase(page);
    if (static_cast<std::int64_t>(reserved_.size()) < kReserved) {
      reserved_.push_back(page);
      continue;
    }
    unmapped_.push_back(page);
    --n_mapped_;
    for (const auto name :
         {DriverWork::unmap, DriverWork::map, DriverWork::set_access, DriverWork::release}) {
      calls_.add(name, handles_);
    }
  }
  n_tokens_ -= requests_.at(id).length;
  requests_.erase(id);
}

double Kvcached::available_bytes() const {
  return static_cast<double>((n_pages_ * blocks_a_page_ - n_blocks_) * kBlock) * shape_.token_bytes;
}

Held Kvcached::held() const {
  const double mapped = static_cast<double>(n_mapped_ * handles_) * Shape::kPage;
  const double blocks = static_cast<double>(n_blocks_ * kBlock) * shape_.token_bytes;
  const double used = static_cast<double>(n_tokens_) * shape_.token_bytes;
  return {.mapped = mapped, .used = used, .partial = blocks - used, .kept = mapped - blocks};
}

// ---- naive ----

Naive::Naive(const Shape& shape, bool recycles)
    : shape_(shape),
      recycles_(recycles),
      page_tokens_(shape.page_tokens(shape.n_layers * shape.n_planes)),
      n_free_(static_cast<std::int64_t>(shape.capacity_bytes / Shape::kPage)) {}

std::int64_t Naive::pages_of(std::int64_t tokens) const { return divided_up(tokens, page_tokens_); }

bool Naive::extend(Id id, std::int64_t n) {
  std::int64_t& length = lengths_.at(id);
  const std::int64_t needed = pages_of(length + n) - pages_of(length);
  if (needed > n_free_) return false;
  n_free_ -= needed;
  n_used_ += needed;
  length += n;
  n_tokens_ += n;
  const std::int64_t n_new = recycles_ ? std::max<std::int64_t>(n_used_ - n_created_, 0) : needed;
  n_created_ += n_new;
  calls_.add(DriverWork::create, n_new);
  calls_.add(DriverWork::map, needed);
  calls_.add(DriverWork::set_access, needed);
  return true;
}

bool Naive::step(std::span<const Id> ids) {
  std::int64_t needed = 0;
  for (const Id id : ids) needed += pages_of(lengths_.at(id) + 1) - pages_of(lengths_.at(id));
  if (needed > n_free_) return false;
  for (const Id id : ids) extend(id, 1);
  return true;
}

void Naive::release(Id id) {
  const std::int64_t n = pages_of(lengths_.at(id));
  calls_.add(DriverWork::unmap, n);
  if (!recycles_) calls_.add(DriverWork::release, n);
  n_free_ += n;
  n_used_ -= n;
  n_tokens_ -= lengths_.at(id);
  lengths_.erase(id);
}

double Naive::available_bytes() const { return static_cast<double>(n_free_) * Shape::kPage; }

Held Naive::held() const {
  const double mapped = static_cast<double>(n_used_) * Shape::kPage;
  const double used = static_cast<double>(n_tokens_) * shape_.token_bytes;
  return {.mapped = mapped, .used = used, .partial = mapped - used};
}

}  // namespace kvspan::bench
