// What an engine's scheduler asks of the memory for KV: one interface for the real cache and for
// the ways of paging that it is compared with. Requests are named by their number in the trace.
//
// Time is virtual, unless paced_span.hpp is at work: a call of the driver takes what others
// measured (DriverTimes), and whoever makes it waits for it: the engine, or the background.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvspan::bench {

// Microseconds a handle (2 to 128 MiB take the same), measured by others: create, an A100,
// kvcached's bench_vmm; the others an A100 and an H100, vAttention's table 3 and forkedkv's notes.
// What is not known, release, is taken to be as long as unmap.
struct DriverTimes {
  double create = 193, map = 2, set_access = 50, unmap = 30, release = 30;
};

// Driver calls so far, and the time that they took.
struct DriverWork {
  enum Name : std::size_t { create, map, set_access, unmap, release };
  static constexpr std::size_t kNames = 5;

  std::array<std::uint64_t, kNames> calls{};
  double seconds = 0;
  double pages_mapped = 0;

  std::uint64_t all_calls() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t n : calls) sum += n;
    return sum;
  }
  DriverWork operator-(const DriverWork& other) const {
    DriverWork difference = *this;
    for (std::size_t i = 0; i < kNames; ++i) difference.calls[i] -= other.calls[i];
    difference.seconds -= other.seconds;
    difference.pages_mapped -= other.pages_mapped;
    return difference;
  }
  DriverWork& operator+=(const DriverWork& other) {
    for (std::size_t i = 0; i < kNames; ++i) calls[i] += other.calls[i];
    seconds += other.seconds;
    pages_mapped += other.pages_mapped;
    return *this;
  }
};

// Bytes at a moment.
struct Held {
  double mapped = 0, used = 0, partial = 0, ahead = 0, kept = 0;

  Held operator*(double weight) const {
    return {mapped * weight, used * weight, partial * weight, ahead * weight, kept * weight};
  }
  Held& operator+=(const Held& o) {
    mapped += o.mapped;
    used += o.used;
    partial += o.partial;
    ahead += o.ahead;
    kept += o.kept;
    return *this;
  }
};

class Memory {
 public:
  using Id = std::size_t;
  virtual ~Memory() = default;

  // A request is about to be prefilled.
  virtual void begin(Id id, std::int64_t prompt) = 0;
  // n more tokens of one, or one more of each; false, and nothing changed, when there is no memory.
  virtual bool extend(Id id, std::int64_t n) = 0;
  virtual bool step(std::span<const Id> ids) = 0;
  virtual void release(Id id) = 0;

  // How many bytes more could be had for tokens, if all that nobody needs were taken.
  virtual double available_bytes() const = 0;
  virtual double bytes_per_token() const = 0;
  virtual Held held() const = 0;

  // What the background does by itself between two moments, in seconds.
  virtual void run_background(double from, double until) = 0;
  // All calls so far, of engine and background: what the background did shows when it was run.
  virtual DriverWork work() const = 0;
  // No more requests are wanted.
  virtual bool is_over() const { return false; }
  // Goes on by as many seconds as a call of the engine's lasts.
  virtual double clock() const { return work().seconds; }
};

}  // namespace kvspan::bench
