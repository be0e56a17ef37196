#include "replay/paced_span.hpp"

#include <algorithm>
#include <thread>

#include "backend/cuda_backend.hpp"
#include "backend/host_backend.hpp"
#include "core/sizes.hpp"
#include "replay/engine.hpp"

namespace kvspan::bench {

namespace {

constexpr std::int32_t kShrink = 32;
constexpr auto kBetweenLooks = std::chrono::milliseconds(5);

// All layers' bytes in one that is so much smaller.
std::vector<LayerSpec> shrunk(const std::vector<LayerSpec>& layers) {
  LayerSpec all = layers.front();
  for (PlaneSpec& plane : all.planes) {
    plane.dim *= plane.heads * static_cast<std::int32_t>(layers.size());
    plane.dim /= kShrink;
    plane.heads = 1;
  }
  return {all};
}

}  // namespace

std::unique_ptr<PacedSpan> PacedSpan::on_host(SpanOptions options, Speed speed) {
  options.layers = shrunk(options.layers);
  options.page_size = Bytes(options.page_size.value / kShrink);
  options.capacity = Bytes(options.capacity.value / kShrink);
  auto backend = make_host_backend({.page_size = options.page_size,
                                    .capacity = options.capacity,
                                    .largest_class = options.largest});
  return std::unique_ptr<PacedSpan>(
      new PacedSpan(options, std::make_unique<TimedBackend>(std::move(backend), std::nullopt), {},
                    speed, kShrink));
}

std::unique_ptr<PacedSpan> PacedSpan::on_emulator(const SpanOptions& options, Speed speed,
                                                  const Emulator& emulator) {
  auto backend = make_cuda_backend({.page_size = options.page_size,
                                    .capacity = options.capacity,
                                    .largest_class = options.largest});
  const Stream stream{reinterpret_cast<std::uintptr_t>(emulator.stream())};
  return std::unique_ptr<PacedSpan>(
      new PacedSpan(options, std::make_unique<TimedBackend>(std::move(backend), DriverTimes{}),
                    stream, speed, 1));
}

PacedSpan::PacedSpan(const SpanOptions& options, std::unique_ptr<TimedBackend> backend,
                     Stream stream, Speed speed, double shrink)
    : SpanMemory(options, std::move(backend), stream, shrink),
      backend_(static_cast<const TimedBackend&>(store().backend())),
      speed_(speed) {
  store().background().start();
}

bool PacedSpan::step(std::span<const Id> ids) {
  ++n_steps_;
  n_late_steps_ += std::ranges::any_of(ids, [&](Id id) {
    const SequenceState& s = state(id);
    return s.length.load() >= s.capacity.load();
  });
  return SpanMemory::step(ids);
}

Held PacedSpan::held() const {
  const auto now = Clock::now();
  if (now - asked_ >= kBetweenLooks) {
    held_ = SpanMemory::held();
    asked_ = now;
  }
  return held_;
}

void PacedSpan::run_background(double, double until) {
  const bool is_slow = until < speed_.slow_s;
  const std::chrono::duration<double> lasts((until - played_) / (is_slow ? 1 : speed_.speed));
  due_ += std::chrono::duration_cast<Clock::duration>(lasts);
  played_ = until;
  std::this_thread::sleep_until(due_);
  work_of_background_ = backend_.work_of_others();
  if (is_slow) slow_ = {Clock::now(), played_, work(), n_steps_, n_late_steps_};
}

DriverWork PacedSpan::work() const {
  DriverWork work = backend_.work_of_engine();
  work += work_of_background_;
  return work;
}

double PacedSpan::clock() const {
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

bool PacedSpan::is_over() const {
  return Clock::now() - slow_.at >= std::chrono::duration<double>(speed_.lasts_s);
}

PacedSpan::Pace PacedSpan::pace() const {
  const std::chrono::duration<double> took = Clock::now() - slow_.at;
  const DriverWork all = work() - slow_.work;
  return {.speed = (played_ - slow_.played) / took.count(),
          .calls_a_second = static_cast<double>(all.all_calls()) / took.count(),
          .pages_a_second = all.pages_mapped / took.count(),
          .late_steps = static_cast<double>(n_late_steps_ - slow_.n_late_steps) /
                        static_cast<double>(n_steps_ - slow_.n_steps)};
}

}  // namespace kvspan::bench
