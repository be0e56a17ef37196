#include "span/background.hpp"

#include <chrono>
#include <system_error>

#include "core/errors.hpp"
#include "span/frame_store.hpp"

namespace kvspan {

namespace {

// Between two pieces on a device: long enough for launches that wait for a driver's lock to get it,
// short enough for a page for each of 256 sequences within two decode steps of 20 ms. A host has no
// launches.
constexpr std::chrono::microseconds kBetweenPieces{100};
// When there was something to do, and when there was nothing. A decode step takes milliseconds and
// what is mapped ahead lasts several, so this is often enough; looking costs a few microseconds.
constexpr std::chrono::microseconds kShortPause{500}, kLongPause{2000};

}  // namespace

Background::~Background() {
  if (store_.backend().usable()) {
    stop();
  } else {
    static_cast<void>(thread_.release());
    static_cast<void>(woken_.release());
  }
}

void Background::start() {
  const std::scoped_lock lock(sleep_);
  if (thread_) return;
  is_stopping_ = false;
  try {
    thread_ = std::make_unique<std::thread>([this] { run(); });
    is_running_.store(true, std::memory_order_relaxed);
  } catch (const std::system_error& e) {
    throw CapacityError(std::string("the pool's background thread cannot be started (") + e.what() +
                        "): raise the limit of threads (ulimit -u), or use background=False");
  }
}

void Background::stop() noexcept {
  std::unique_ptr<std::thread> thread;
  {
    const std::scoped_lock lock(sleep_);
    is_stopping_ = true;
    is_running_.store(false, std::memory_order_relaxed);
    thread.swap(thread_);
  }
  woken_->notify_one();
  if (thread) thread->join();
}

void Background::wake() noexcept {
  {
    const std::scoped_lock lock(sleep_);
    if (!thread_ || is_woken_) return;
    is_woken_ = true;
  }
  woken_->notify_one();
}

void Background::add(Worker* worker) {
  const std::scoped_lock lock(turn_);
  workers_.push_back(worker);
}

void Background::remove(Worker* worker) noexcept {
  const std::scoped_lock lock(turn_);
  std::erase(workers_, worker);
}

WorkDone Background::piece(TimePoint now) noexcept {
  const std::scoped_lock lock(turn_);
  WorkDone done;
  for (Worker* worker : workers_) done += worker->work_ahead(now);
  // Frames to have in hand are less urgent than pages.
  if (done.n_frames > 0) {
    done.has_more = true;
  } else {
    done += store_.keep_ready();
  }
  return done;
}

WorkDone Background::turn(TimePoint now) noexcept {
  WorkDone done;
  do {
    done.has_more = false;
    done += piece(now);
  } while (done.has_more);
  return done;
}

void Background::run() noexcept {
  const bool has_launches = store_.backend().traits().kind != DeviceKind::cpu;
  for (;;) {
    const WorkDone done = piece();
    std::unique_lock lock(sleep_);
    const auto is_over = [&] { return is_woken_ || is_stopping_; };
    if (done.has_more) {
      if (has_launches) woken_->wait_for(lock, kBetweenPieces, [&] { return is_stopping_; });
    } else if (done.is_idle) {
      woken_->wait(lock, is_over);
    } else {
      woken_->wait_for(lock, done.n_frames > 0 ? kShortPause : kLongPause,
                       [&] { return is_stopping_; });
    }
    is_woken_ = false;
    if (is_stopping_) return;
  }
}

}  // namespace kvspan
