#include "replay/span_memory.hpp"

#include <algorithm>

#include "core/errors.hpp"

namespace kvspan::bench {

namespace {

// Between two pieces of the background's work, and between two looks (span/background.cpp).
constexpr double kBetweenPieces = 100e-6, kLook = 2e-3;

TimePoint at(double seconds) {
  return TimePoint(
      std::chrono::duration_cast<TimePoint::duration>(std::chrono::duration<double>(seconds)));
}

}  // namespace

SpanMemory::SpanMemory(const SpanOptions& o) : kind_(o.kind) {
  auto backend = std::make_unique<NullBackend>(o.kind, o.page_size);
  backend_ = backend.get();
  store_ = std::make_shared<FrameStore>(std::move(backend), o.capacity, o.largest);
  store_->background().start_without_thread();
  CacheOptions options;
  options.layers = o.layers;
  options.max_seqs = o.max_seqs;
  options.max_seq_len = Tokens(o.max_seq_len);
  options.layers_per_page = o.layers_per_page;
  options.split_planes = o.split_planes;
  options.overread = Tokens(0);
  cache_ = Cache::make(store_, options);
}

void SpanMemory::begin(Id id, std::int64_t prompt) {
  sequences_[id] = cache_->sequence(Tokens(prompt));
}

bool SpanMemory::extend(Id id, std::int64_t n) {
  try {
    sequences_.at(id)->extend(Tokens(n), {});
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
    batch_ = cache_->batch(std::move(rows));
  }
  try {
    batch_->step(Tokens(1), {});
    return true;
  } catch (const OutOfMemory&) {
    return false;
  }
}

void SpanMemory::release(Id id) {
  batch_.reset();
  batch_ids_.clear();
  sequences_.at(id)->release({});
  sequences_.erase(id);
}

// What a sequence has room for is its own, but for the prompt that it waits for, which is counted
// by who adds up the prompts.
double SpanMemory::available_bytes() const {
  std::int64_t tokens = 0;
  for (const auto& [id, sequence] : sequences_) {
    const std::int64_t length = sequence->state()->length;
    const std::int64_t announced = sequence->state()->announced;
    const std::int64_t capacity = sequence->state()->capacity;
    tokens += length + std::max<std::int64_t>(capacity - std::max(length, announced), 0);
  }
  return static_cast<double>(store_->counts().capacity.value) -
         static_cast<double>(tokens) * bytes_per_token();
}

double SpanMemory::bytes_per_token() const {
  return static_cast<double>(cache_->space()->layout().bytes_per_token().value);
}

Held SpanMemory::held() const {
  const CacheFigures f = cache_->figures();
  const auto bytes = [](Bytes b) { return static_cast<double>(b.value); };
  return {bytes(f.mapped), bytes(f.used), bytes(f.partial), bytes(f.ahead), bytes(f.kept)};
}

void SpanMemory::run_background(double from, double until) {
  for (double now = std::max(from, background_until_); now < until;) {
    const double before = work().seconds;
    const WorkDone done = store_->background().piece(at(now));
    now += work().seconds - before + (done.has_more ? kBetweenPieces : kLook);
    background_until_ = now;
  }
}

DriverWork SpanMemory::work() const {
  constexpr DriverTimes times;
  const CallCounters& calls = backend_->calls();
  DriverWork work;
  const auto add = [&](DriverWork::Name name, Call call, double microseconds) {
    work.calls[name] = calls.of(call).calls;
    work.seconds += static_cast<double>(calls.of(call).handles) * microseconds * 1e-6;
  };
  add(DriverWork::create, Call::create, times.create);
  add(DriverWork::map, Call::map, times.map);
  if (kind_ == DeviceKind::cuda) add(DriverWork::set_access, Call::set_access, times.set_access);
  add(DriverWork::unmap, Call::unmap, times.unmap);
  add(DriverWork::release, Call::release, times.release);
  work.pages_mapped = static_cast<double>(backend_->pages_mapped());
  return work;
}

}  // namespace kvspan::bench
