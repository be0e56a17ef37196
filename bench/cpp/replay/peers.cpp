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

VAttention::VAttention(const Shape& shape, bool megacache, bool has_thread)
    : shape_(shape),
      has_thread_(has_thread),
      pages_a_block_(shape.n_planes * (megacache ? 1 : shape.n_layers)),
      block_tokens_(shape.page_tokens(megacache ? shape.n_layers : 1)),
      n_free_(static_cast<std::int64_t>(shape.capacity_bytes / Shape::kPage) / pages_a_block_) {}

std::int64_t VAttention::blocks_of(std::int64_t tokens) const {
  return divided_up(tokens, block_tokens_);
}

void VAttention::begin(Id id, std::int64_t prompt) {
  // The first free slot, unless another one that holds the prompt holds less than it.
  const std::int64_t wanted = blocks_of(prompt);
  std::size_t best = slots_.size();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].is_used) continue;
    const bool is_first = best == slots_.size();
    if (is_first || (slots_[i].blocks >= wanted && slots_[i].blocks < slots_[best].blocks)) {
      best = i;
    }
  }
  if (best == slots_.size()) slots_.emplace_back();
  slots_[best].is_used = true;
  slot_of_[id] = best;
}

bool VAttention::reclaim(std::int64_t blocks) {
  for (std::size_t i = slots_.size(); i-- > 0 && n_free_ < blocks;) {
    // What the next step needs is needed.
    const std::int64_t needed = slots_[i].is_used ? slots_[i].length + 1 : 0;
    const std::int64_t n = slots_[i].blocks - blocks_of(needed);
    if (n <= 0) continue;
    calls_.add(DriverWork::unmap, n * pages_a_block_);
    slots_[i].blocks -= n;
    n_free_ += n;
  }
  return n_free_ >= blocks;
}

std::int64_t VAttention::missing(const Slot& slot, std::int64_t tokens) const {
  return std::max<std::int64_t>(blocks_of(tokens) - slot.blocks, 0);
}

bool VAttention::grow(Slot& slot, std::int64_t tokens) {
  const std::int64_t n = missing(slot, tokens);
  if (n == 0) return true;
  if (n_free_ < n && !reclaim(n)) return false;
  n_free_ -= n;
  slot.blocks += n;
  calls_.add(DriverWork::map, n * pages_a_block_);
  calls_.add(DriverWork::set_access, n * pages_a_block_);
  return true;
}

bool VAttention::extend(Id id, std::int64_t n) {
  Slot& slot = slots_[slot_of_.at(id)];
  slot.length += n;
  if (grow(slot, slot.length)) return true;
  slot.length -= n;
  return false;
}

bool VAttention::step(std::span<const Id> ids) {
  if (thread_until_ > now_) {
    waited_ += thread_until_ - now_;
    now_ = thread_until_;
  }
  // All lengths first, so that nobody's next block is taken for another's.
  for (const Id id : ids) ++slots_[slot_of_.at(id)].length;
  const bool is_there = std::ranges::all_of(ids, [&](Id id) {
    Slot& slot = slots_[slot_of_.at(id)];
    return grow(slot, slot.length);
  });
  if (!is_there) {
    for (const Id id : ids) --slots_[slot_of_.at(id)].length;
    return false;
  }
  is_thread_due_ = has_thread_;
  return true;
}

void VAttention::run_background(double from, double until) {
  now_ = until;
  if (!is_thread_due_) return;
  is_thread_due_ = false;
  const double before = calls_.work().seconds;
  look_ahead();
  thread_until_ = from + calls_.work().seconds - before;
}

void VAttention::look_ahead() {
  std::int64_t needed = 0;
  for (const Slot& slot : slots_) {
    if (slot.length > 0) needed += missing(slot, slot.length + 1);
  }
  if (n_free_ < needed && !reclaim(needed)) return;
  std::int64_t n_mapped = 0;
  for (std::int64_t ahead = 1; ahead <= kLookahead; ++ahead) {
    for (Slot& slot : slots_) {
      if (slot.length == 0) continue;
      const std::int64_t n = missing(slot, slot.length + ahead);
      if (n > n_free_) continue;
      grow(slot, slot.length + ahead);
      n_mapped += n;
      if (ahead > 1 && n_mapped >= kBlocksAhead) return;
    }
  }
}

void VAttention::release(Id id) {
  Slot& slot = slots_[slot_of_.at(id)];
  slot.is_used = false;
  slot.length = 0;
  slot_of_.erase(id);
}

double VAttention::available_bytes() const {
  std::int64_t blocks = n_free_;
  for (const Slot& slot : slots_) blocks += slot.blocks - blocks_of(slot.length);
  return static_cast<double>(blocks) * block_tokens_ * shape_.token_bytes;
}

Held VAttention::held() const {
  Held held;
  for (const Slot& slot : slots_) {
    const double mapped =
        static_cast<double>(slot.blocks) * static_cast<double>(pages_a_block_) * Shape::kPage;
    const double used = static_cast<double>(slot.length) * shape_.token_bytes;
    held.mapped += mapped;
    held.used += used;
    (slot.is_used ? held.partial : held.kept) += mapped - used;
  }
  return held;
}

// ---- kvcached ----

Kvcached::Kvcached(const Shape& shape, bool compound)
    : shape_(shape),
      layers_(shape.n_layers * shape.n_planes),
      handles_(compound ? 1 : layers_),
      blocks_a_page_(static_cast<std::int64_t>(shape.page_tokens(1)) / kBlock),
      n_pages_(static_cast<std::int64_t>(shape.capacity_bytes / Shape::kPage) / layers_),
      used_(static_cast<std::size_t>(n_pages_)) {
  for (std::size_t i = used_.size(); i-- > 0;) unmapped_.push_back(i);
}

void Kvcached::begin(Id id, std::int64_t) { requests_[id] = {}; }

std::size_t Kvcached::map_page() {
  const std::size_t page = unmapped_.back();
  unmapped_.pop_back();
  ++n_mapped_;
  calls_.add(DriverWork::unmap, handles_);  // the zero page
  calls_.add(DriverWork::create, handles_);
  calls_.add(DriverWork::map, handles_, layers_ / handles_);
  calls_.add(DriverWork::set_access, handles_);
  return page;
}

void Kvcached::unmap_page(std::size_t page) {
  unmapped_.push_back(page);
  --n_mapped_;
  calls_.add(DriverWork::unmap, handles_);
  calls_.add(DriverWork::map, handles_, 0);  // the zero page
  calls_.add(DriverWork::set_access, handles_);
  calls_.add(DriverWork::release, handles_);
}

std::int64_t Kvcached::free_blocks() const {
  std::int64_t n = blocks_a_page_ * static_cast<std::int64_t>(reserved_.size() + unmapped_.size());
  for (const auto& [page, free] : partly_free_) n += free;
  return n;
}

bool Kvcached::take_blocks(Request& request, std::int64_t n) {
  if (n > free_blocks()) return false;
  for (; n > 0; --n) {
    if (partly_free_.empty()) {
      std::size_t page = 0;
      if (reserved_.empty()) {
        page = map_page();
      } else {
        page = reserved_.back();
        reserved_.pop_back();
      }
      is_thread_due_ = true;
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

void Kvcached::run_background(double from, double until) {
  double now = std::max(from, thread_until_);
  while (is_thread_due_ && now < until) {
    is_thread_due_ = static_cast<std::int64_t>(reserved_.size()) < kLeastReserved;
    if (!is_thread_due_ || unmapped_.empty()) return;
    const double before = calls_.work().seconds;
    reserved_.push_back(map_page());
    now += calls_.work().seconds - before;
    thread_until_ = now;
  }
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
  if (needed > free_blocks()) return false;
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
    if (static_cast<std::int64_t>(reserved_.size()) < kMostReserved) {
      reserved_.push_back(page);
    } else {
      unmap_page(page);
    }
  }
  n_tokens_ -= requests_.at(id).length;
  requests_.erase(id);
}

double Kvcached::available_bytes() const {
  return static_cast<double>((n_pages_ * blocks_a_page_ - n_blocks_) * kBlock) * shape_.token_bytes;
}

Held Kvcached::held() const {
  const double mapped = static_cast<double>(n_mapped_ * layers_) * Shape::kPage;
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
