#include "replay/modelled_span.hpp"

#include <algorithm>

namespace kvspan::bench {

namespace {

// Between two pieces of the background's work, and between two looks (span/background.cpp).
constexpr double kBetweenPieces = 100e-6, kLook = 2e-3;

TimePoint at(double seconds) {
  return TimePoint(
      std::chrono::duration_cast<TimePoint::duration>(std::chrono::duration<double>(seconds)));
}

}  // namespace

ModelledSpan::ModelledSpan(const SpanOptions& options)
    : ModelledSpan(options, std::make_unique<NullBackend>(options.kind, options.page_size)) {}

ModelledSpan::ModelledSpan(const SpanOptions& options, std::unique_ptr<NullBackend> backend)
    : SpanMemory(options, std::move(backend)),
      kind_(options.kind),
      backend_(static_cast<const NullBackend&>(store().backend())) {
  store().background().start_without_thread();
}

bool ModelledSpan::extend(Id id, std::int64_t n) {
  const SequenceState& s = state(id);
  wait_if(is_unmapping_ || std::ranges::any_of(unfinished_, [&](const MapperEvent& event) {
            return event.slot == s.slot && event.room < Tokens(n);
          }));
  return SpanMemory::extend(id, n);
}

bool ModelledSpan::step(std::span<const Id> ids) {
  const auto is_short = [&](const MapperEvent& event) {
    return event.room < Tokens(1) &&
           std::ranges::any_of(ids, [&](Id id) { return state(id).slot == event.slot; });
  };
  const auto has_no_room = [&](Id id) { return state(id).length >= state(id).capacity; };
  wait_if(std::ranges::any_of(unfinished_, is_short) ||
          (is_unmapping_ && std::ranges::any_of(ids, has_no_room)));
  return SpanMemory::step(ids);
}

void ModelledSpan::wait_if(bool is_held_up) {
  if (!is_held_up || busy_until_ <= now_) return;
  waited_ += busy_until_ - now_;
  now_ = busy_until_;
}

void ModelledSpan::run_background(double from, double until) {
  now_ = until;
  for (double now = std::max(from, next_piece_); now < until; now = next_piece_) {
    unfinished_.clear();
    is_unmapping_ = false;
    const DriverWork before = work();
    const WorkDone done = store().background().piece(at(now));
    const DriverWork piece = work() - before;
    busy_until_ = now + piece.seconds;
    next_piece_ = busy_until_ + (done.has_more ? kBetweenPieces : kLook);
    if (busy_until_ > until) note_unfinished(at(now), piece);
  }
}

void ModelledSpan::note_unfinished(TimePoint piece_began, const DriverWork& piece) {
  for (const MapperEvent& event : cache().mapper_events()) {
    const bool is_this = event.at == piece_began && event.kind == MapperEvent::Kind::mapped;
    if (is_this) unfinished_.push_back(event);
  }
  is_unmapping_ = piece.calls[DriverWork::unmap] > 0;
}

DriverWork ModelledSpan::work() const {
  constexpr DriverTimes times;
  const CallCounters& calls = backend_.calls();
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
  work.pages_mapped = static_cast<double>(backend_.pages_mapped());
  return work;
}

}  // namespace kvspan::bench
