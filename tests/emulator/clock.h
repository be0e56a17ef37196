// Virtual time: what the calls would cost, without any real waiting. Every host thread has a clock
// of its own (a lane). A call moves its lane on by the call's latency; the calls that take a
// context's lock (virtual-memory calls and launches) also book that lock, so that two lanes wait
// for each other as two threads would. Lanes advance independently, so a lane may come to the lock
// at a time earlier than something already booked: it then takes the first gap that is long enough.
// Guarded by State::mutex.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Options;

struct Lane {
  double now_us = 0;
  double lock_wait_us = 0;
  double call_time_us = 0;
  double sync_wait_us = 0;
};

bool has_default_latency(std::string_view call);

class Clock {
 public:
  void reset(const Options& options);

  Lane& lane();       // of the calling thread
  int lane_number();  // its number: chosen ones from 0, a thread's own from 1000
  void choose_lane(int number);
  double earliest() const;  // over all lanes

  // `count` units of the call, under the lock of context `lock` when the call takes one (-1: none).
  void charge(std::string_view call, std::size_t count, int lock);
  void wait_until(double us);

 private:
  double book(int lock, double from, double duration);

  const Options* options_ = nullptr;
  unsigned generation_ = 0;
  int next_own_ = 1000;
  std::map<int, Lane> lanes_;
  std::map<int, std::map<double, double>> busy_;  // lock -> start -> end
};

}  // namespace emulator
