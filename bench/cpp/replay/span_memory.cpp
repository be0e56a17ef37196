#include "replay/span_memory.hpp"

#include <algorithm>

#include "core/errors.hpp"

namespace kvspan::bench {

SpanMemory::SpanMemory(const SpanOptions& o, std::unique_ptr<Backend> backend, Stream stream,
                       double shrink)
    : stream_(stream),
      shrink_(shrink),
      store_(std::make_shared<FrameStore>(std::move(backend), o.capacity, o.largest)) {
  CacheOptions options;
  options.layers = o.layers;
  options.max_seqs = o.max_seqs;
  options.max_seq_len = Tokens(o.max_seq_len);
  options.layers_per_page = o.layers_per_page;
  options.split_planes = o.split_planes;
  options.overread = Tokens(0);
  if (!store_->backend().traits().zero_on_unmapped) options.unmapped = Unmapped::fault;
  cache_ = Cache::make(store_, options);
}

void SpanMemory::begin(Id id, std::int64_t prompt) {
  sequences_[id] = cache_->sequence(Tokens(prompt), stream_);
}

bool SpanMemory::extend(Id id, std::int64_t n) {
  try {
    sequences_.at(id)->extend(Tokens(n), stream_);
    return true;
  } catch (const OutOfMemory&) {
    return false;
  }
}

bool SpanMemory::step(std::span<const Id> ids) {
  if (!std::ranges::equal(ids, batch_ids_)) {
    batch_ids_.assign(ids.begin(), ids.end());
    std::vector<std::shared_ptr<Sequence>> rows;
    for (const Id id : ids) rows.push_back(sequences_.at(id));
    batch_ = cache_->batch(std::move(rows), stream_);
  }
  try {
    batch_->step(Tokens(1), stream_);
    return true;
  } catch (const OutOfMemory&) {
    return false;
  }
}

void SpanMemory::release(Id id) {
  batch_.reset();
  batch_ids_.clear();
  sequences_.at(id)->release(stream_);
  sequences_.erase(id);
}

// What a sequence has room for is its own, but for the prompt that it waits for, which is counted
// by who adds up the prompts, and for what is more than two pages ahead: that can be reclaimed.
double SpanMemory::available_bytes() const {
  Bytes least = store_->page_size();  // that a token takes in a page
  for (const Lane& lane : cache_->space()->layout().lanes()) {
    least = std::min(least, lane.token_bytes);
  }
  const auto two_pages = static_cast<std::int64_t>(2 * store_->page_size().value / least.value);
  std::int64_t tokens = 0;
  for (const auto& [id, sequence] : sequences_) {
    const std::int64_t length = sequence->state()->length;
    const std::int64_t announced = sequence->state()->announced;
    const std::int64_t capacity = sequence->state()->capacity;
    const std::int64_t room = capacity - std::max(length, announced);
    tokens += length + std::clamp<std::int64_t>(room, 0, two_pages);
  }
  return shrink_ * static_cast<double>(store_->counts().capacity.value) -
         static_cast<double>(tokens) * bytes_per_token();
}

double SpanMemory::bytes_per_token() const {
  return shrink_ * static_cast<double>(cache_->space()->layout().bytes_per_token().value);
}

Held SpanMemory::held() const {
  const CacheFigures f = cache_->figures();
  const auto bytes = [&](Bytes b) { return shrink_ * static_cast<double>(b.value); };
  return {bytes(f.mapped), bytes(f.used), bytes(f.partial), bytes(f.ahead), bytes(f.kept)};
}

}  // namespace kvspan::bench
