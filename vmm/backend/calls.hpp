// Exact counts of driver calls, by name. A call may concern many handles (frames mapped by one
// mmap, say); on a GPU the cost is per handle, so both are counted.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvspan {

enum class Call : std::uint8_t {
  reserve,
  free,
  create,
  release,
  map,
  set_access,
  unmap,
  copy,
  fill,
  record_fence,
  wait_fence,
  order_after,
  export_frame,
  import_frame,
};

inline constexpr std::size_t kCalls = 14;

constexpr std::array<std::string_view, kCalls> kCallNames = {
    "reserve", "free", "create",       "release",    "map",         "set_access",   "unmap",
    "copy",    "fill", "record_fence", "wait_fence", "order_after", "export_frame", "import_frame"};

struct CallCount {
  std::uint64_t calls = 0;
  std::uint64_t handles = 0;
};

// Counters that any thread may raise. Relaxed: they order nothing, they are only summed.
class CallCounters {
 public:
  void add(Call call, std::uint64_t handles, std::uint64_t calls = 1) noexcept {
    auto& c = counters_[static_cast<std::size_t>(call)];
    c.calls.fetch_add(calls, std::memory_order_relaxed);
    c.handles.fetch_add(handles, std::memory_order_relaxed);
  }

  CallCount of(Call call) const noexcept {
    const auto& c = counters_[static_cast<std::size_t>(call)];
    return {c.calls.load(std::memory_order_relaxed), c.handles.load(std::memory_order_relaxed)};
  }

 private:
  struct Counter {
    std::atomic<std::uint64_t> calls{0};
    std::atomic<std::uint64_t> handles{0};
  };
  std::array<Counter, kCalls> counters_;
};

}  // namespace kvspan
