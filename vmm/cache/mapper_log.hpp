// The last decisions of the mapper, and what came too late for it: for who asks why a step had to
// call the driver. Any thread may note and read; what is noted takes nanoseconds beside the driver
// call that it is about.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "core/ids.hpp"
#include "span/background.hpp"

namespace kvspan {

struct MapperEvent {
  enum class Kind : std::uint8_t {
    mapped,    // ahead of need
    late,      // mapped by the call that needed it
    unmapped,  // what a free slot kept over the limit
    starved,   // nothing to be had for a page ahead: no more attempts for a while
    failed,    // the driver did
  };

  TimePoint at{};
  Kind kind{};
  SlotId slot{};
  Pages pages{};  // that the slot got or lost
  Tokens room{};  // for so many more tokens before that
};

class MapperLog {
 public:
  void note(const MapperEvent& event) noexcept {
    const std::scoped_lock lock(mutex_);
    events_[n_noted_++ % kEvents] = event;
  }

  // From the oldest on that is still there.
  std::vector<MapperEvent> events() const {
    std::vector<MapperEvent> result;
    result.reserve(kEvents);
    const std::scoped_lock lock(mutex_);
    for (std::uint64_t i = n_noted_ - std::min(n_noted_, kEvents); i < n_noted_; ++i) {
      result.push_back(events_[i % kEvents]);
    }
    return result;
  }

 private:
  static constexpr std::uint64_t kEvents = 1024;

  mutable std::mutex mutex_;  // guards what follows
  std::array<MapperEvent, kEvents> events_{};
  std::uint64_t n_noted_ = 0;
};

}  // namespace kvspan
