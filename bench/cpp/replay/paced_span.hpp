// The real cache in real time, at so many times the speed of the trace: the engine's calls come
// when it is time for them, and the pool's own thread works beside them. Over
//
//   host      the host backend: real memory, really mapped. Records and pages are 32 times smaller
//             than the model's (60 GiB in 2), which leaves all arithmetic of tokens and pages.
//   emulator  the CUDA backend on the driver emulator, without memory, whose calls are made to last
//             as long as a GPU's (DriverTimes): not a GPU result.
//
// The first seconds of a saturated replay, which do not count, pass at the trace's own speed: what
// a background in haste leaves behind would stay for long.
#pragma once

#include <chrono>
#include <memory>

#include "emulator.hpp"
#include "replay/span_memory.hpp"
#include "replay/timed_backend.hpp"

namespace kvspan::bench {

class PacedSpan final : public SpanMemory {
 public:
  struct Speed {
    double speed;
    double slow_s;   // at first, at the trace's own speed
    double lasts_s;  // then, in real time
  };

  static std::unique_ptr<PacedSpan> on_host(SpanOptions options, Speed speed);
  // The emulator must be there first, and stay.
  static std::unique_ptr<PacedSpan> on_emulator(const SpanOptions& options, Speed speed,
                                                const Emulator& emulator);

  bool step(std::span<const Id> ids) override;
  Held held() const override;
  void run_background(double from, double until) override;
  DriverWork work() const override;
  double clock() const override;
  bool is_over() const override;

  // Since the first seconds, in real time.
  struct Pace {
    double speed, calls_a_second, pages_a_second;
    double late_steps;  // share with a row that had no room: they map, or wait for who does
  };
  Pace pace() const;

 private:
  using Clock = std::chrono::steady_clock;

  PacedSpan(const SpanOptions& options, std::unique_ptr<TimedBackend> backend, Stream stream,
            Speed speed, double shrink);

  const TimedBackend& backend_;
  const Speed speed_;
  std::size_t n_steps_ = 0, n_late_steps_ = 0;
  DriverWork work_of_background_;  // as of the last time that it was let run
  mutable Held held_;              // as of a moment ago: asking holds up the background
  mutable Clock::time_point asked_{};
  Clock::time_point due_ = Clock::now();  // when what has been played so far should have been
  double played_ = 0;
  struct {
    Clock::time_point at;
    double played;
    DriverWork work;
    std::size_t n_steps, n_late_steps;
  } slow_{due_, 0, {}, 0, 0};  // when the first seconds were over
};

}  // namespace kvspan::bench
