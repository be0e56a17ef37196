// An engine with continuous batching over a trace, in virtual time and without a model: requests
// are admitted in order of arrival when their prompt fits beside what is promised already, 5 ms
// before kernels are launched; prompts are prefilled in pieces of 2,048 tokens at 8,000 tokens/s
// each, and then every request makes a token every 1/30 s. When there is no memory for the next
// tokens, the request that came last is preempted: it is released, waits at the head of the queue,
// and is computed again.
//
// `saturated`: all requests wait from the beginning. What is counted begins when the memory has
// been filled for the first time, and ends when no request waits any more. Those that are admitted
// at once in the beginning are of every age.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "replay/memory.hpp"
#include "replay/trace.hpp"

namespace kvspan::bench {

inline constexpr double kTick = 1.0 / 30;
inline constexpr double kWarmUp = 20;      // seconds of a saturated replay that do not count
inline constexpr double kSchedule = 5e-3;  // from the choice of requests to the launch of kernels
inline constexpr double kPrefillTokensPerSecond = 8000;
inline constexpr std::int64_t kPiece = 2048;

struct ReplayResult {
  std::size_t n_requests = 0, n_preempted = 0, n_ticks = 0, n_steps = 0;
  // Integrals over the time in which requests waited for memory (all of it where none had to).
  Held held;
  double concurrency = 0, weighted_s = 0, peak_concurrency = 0;
  DriverWork in_calls, in_background;
  // Seconds that each call had to wait for the driver, or for the background: of steps, and of
  // pieces of prompts. In real time, seconds that it took.
  std::vector<double> step_stalls, piece_stalls;
  std::vector<double> waste_over_time;  // percent, each second
  // Of the second in which most pages were mapped.
  double worst_pages = 0, worst_seconds_in_calls = 0, worst_seconds = 0;
};

ReplayResult replay(Memory& memory, std::span<const Request> requests, bool saturated);

}  // namespace kvspan::bench
