// The pool's background thread: what nobody should have to wait for is done here, ahead of time. It
// keeps frames ready and lets its workers (the caches) map pages ahead; what is worth doing is
// their decision, when is decided here.
//
// It goes frame by frame, with pauses: should a driver's calls for a context exclude each other,
// launches of kernels among them, then no launch has to wait for a row of them.
//
// It polls while sequences live, since a decode step must not pay for waking it, and sleeps until
// it is woken when none do. Threads: everything may be called from any thread. A turn holds
// `turn_`, so whoever removes a worker waits for the turn's end and must hold no lock that a worker
// takes.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kvspan {

class FrameStore;

struct WorkDone {
  std::size_t n_frames = 0;  // created or mapped
  bool is_idle = true;       // nobody is left who may need more soon
  bool has_more = false;     // that could be done at once

  WorkDone& operator+=(WorkDone other) {
    n_frames += other.n_frames;
    is_idle = is_idle && other.is_idle;
    has_more = has_more || other.has_more;
    return *this;
  }
};

using TimePoint = std::chrono::steady_clock::time_point;

class Worker {
 public:
  // Does the next piece of what can be done ahead, without taking from anybody what he has a use
  // for: a frame, or those that cannot wait. `now` never goes back. One thread at a time.
  virtual WorkDone work_ahead(TimePoint now) noexcept = 0;

 protected:
  ~Worker() = default;
};

class Background {
 public:
  explicit Background(FrameStore& store) : store_(store) {}
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;
  // Stops the thread. In a child of fork(2), where it does not exist, leaves everything alone.
  ~Background();

  // Starts the thread, if it is not running. Throws CapacityError when the machine gives none.
  void start();
  // Ends it after the call that it is in. Nothing is done ahead from then on, until `start`.
  void stop() noexcept;

  // The next piece of work, by the calling thread: what the background thread does between pauses.
  WorkDone piece(TimePoint now = TimePoint::clock::now()) noexcept;
  // All there is to do now.
  WorkDone turn(TimePoint now = TimePoint::clock::now()) noexcept;

  // In place of `start`, for who calls `piece` or `turn` often enough himself, in his own time.
  void start_without_thread() noexcept { is_running_.store(true, std::memory_order_relaxed); }

  // Whether what can be left to the background gets done there.
  bool is_running() const noexcept { return is_running_.load(std::memory_order_relaxed); }

  // Ends a sleep. Cheap, and harmless when there is no thread.
  void wake() noexcept;

  void add(Worker* worker);
  void remove(Worker* worker) noexcept;

 private:
  void run() noexcept;

  FrameStore& store_;

  std::mutex turn_;  // guards workers_
  std::vector<Worker*> workers_;

  std::mutex sleep_;  // guards what follows
  // Owned apart: destroying a condition waits for those who wait on it, which a child of fork(2)
  // would do for ever.
  std::unique_ptr<std::condition_variable> woken_ = std::make_unique<std::condition_variable>();
  bool is_woken_ = false;
  bool is_stopping_ = false;
  std::unique_ptr<std::thread> thread_;
  std::atomic<bool> is_running_{false};  // relaxed: what it says may be over at once
};

}  // namespace kvspan
