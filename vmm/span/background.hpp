// The pool's background thread: what nobody should have to wait for is done here, ahead of time. It
// keeps frames ready and lets its workers (the caches) map pages ahead; what is worth doing is
// their decision, when is decided here.
//
// It polls while sequences live, since a decode step must not pay for waking it, and sleeps until
// it is woken when none do. Threads: everything may be called from any thread. A turn holds
// `turn_`, so whoever removes a worker waits for the turn's end and must hold no lock that a worker
// takes.
#pragma once

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

  WorkDone& operator+=(WorkDone other) {
    n_frames += other.n_frames;
    is_idle = is_idle && other.is_idle;
    return *this;
  }
};

class Worker {
 public:
  // Does what can be done ahead, without taking anything away from anybody.
  virtual WorkDone work_ahead() noexcept = 0;

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

  // One round of work by the calling thread, as the background thread does it.
  WorkDone turn() noexcept;

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
  std::condition_variable woken_;
  bool is_woken_ = false;
  bool is_stopping_ = false;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace kvspan
