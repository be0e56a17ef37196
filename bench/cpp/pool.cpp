// What taking frames and giving them back costs, in the frame pool and in what else one would use.
// Batches of 16 were taken and given back at random until half of the frames are free.
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool/frame_pool.hpp"
#include "samples.hpp"

#if __has_include(<boost/lockfree/stack.hpp>)
#include <boost/lockfree/stack.hpp>
#define KVSPAN_BENCH_BOOST 1
#endif

namespace {

using namespace kvspan;

constexpr std::uint32_t kFrames = 1 << 16, kBatch = 16;
constexpr SizeClass kClass{0};
constexpr int kStalls = 20;

void stall(int);

// ---- what is compared: take fills `out` or returns false, give takes back ----

class Ours {
 public:
  static constexpr const char* kName = "kvspan";
  bool take(std::span<FrameId> out) { return pool_.take(kClass, out); }
  bool give(std::span<const FrameId> frames) { return pool_.give(frames).refused == 0; }

 private:
  FramePool pool_{Pages(kFrames), kClass};
};

// A vector of free ids under a lock. With checks, it counts references as the pool does, and
// refuses ids that are foreign or free.
template <bool kChecks>
class Locked {
 public:
  static constexpr const char* kName = kChecks ? "mutex, checked" : "mutex";
  Locked() : free_(kFrames), references_(kFrames) { std::iota(free_.begin(), free_.end(), 0u); }

  bool take(std::span<FrameId> out) {
    const std::scoped_lock lock(mutex_);
    if (free_.size() < out.size()) return false;
    for (FrameId& frame : out) {
      frame = FrameId(kClass, free_.back());
      free_.pop_back();
      if (kChecks) references_[frame.index()] = 1;
    }
    return true;
  }

  bool give(std::span<const FrameId> frames) {
    const std::scoped_lock lock(mutex_);
    bool is_right = true;
    for (const FrameId frame : frames) {
      if (kChecks) {
        if (frame.index() >= kFrames || references_[frame.index()] == 0) {
          is_right = false;
          continue;
        }
        if (--references_[frame.index()] > 0) continue;
      }
      free_.push_back(frame.index());
    }
    return is_right;
  }

  void stall_inside() {
    const std::scoped_lock lock(mutex_);
    stall(0);
  }

 private:
  std::mutex mutex_;
  std::vector<std::uint32_t> free_, references_;
};

#ifdef KVSPAN_BENCH_BOOST
class BoostStack {
 public:
  static constexpr const char* kName = "boost::lockfree::stack";
  BoostStack() {
    for (std::uint32_t i = 0; i < kFrames; ++i) free_.push(i);
  }
  bool take(std::span<FrameId> out) {
    for (std::size_t n = 0; n < out.size(); ++n) {
      std::uint32_t id = 0;
      if (!free_.pop(id)) return give(out.first(n)) && false;
      out[n] = FrameId(kClass, id);
    }
    return true;
  }
  bool give(std::span<const FrameId> frames) {
    for (const FrameId frame : frames) free_.push(frame.index());
    return true;
  }

 private:
  boost::lockfree::stack<std::uint32_t> free_{kFrames};
};
#endif

// ---- measuring ----

using Batches = std::vector<std::vector<FrameId>>;

// A pool of which half is in use, by batches that came and went; and those batches.
template <class Pool>
std::pair<std::unique_ptr<Pool>, Batches> half_used() {
  auto pool = std::make_unique<Pool>();
  Batches batches(kFrames / kBatch, std::vector<FrameId>(kBatch));
  std::vector<FrameId> all;
  for (auto& batch : batches) {
    if (!pool->take(batch)) throw std::runtime_error("not all frames can be had");
    all.insert(all.end(), batch.begin(), batch.end());
  }
  std::ranges::sort(all);
  if (std::ranges::adjacent_find(all) != all.end()) throw std::runtime_error("a frame twice");
  std::mt19937 random(1);
  std::ranges::shuffle(batches, random);
  const auto give_last = [&] {
    if (!pool->give(batches.back())) throw std::runtime_error("refused");
  };
  for (; batches.size() > kFrames / kBatch / 2; batches.pop_back()) give_last();
  for (int i = 0; i < 20'000; ++i) {
    std::swap(batches[random() % batches.size()], batches.back());
    give_last();
    if (!pool->take(batches.back())) throw std::runtime_error("a free frame cannot be had");
  }
  return {std::move(pool), std::move(batches)};
}

template <class Pool>
void take_and_give(Pool& pool, std::span<FrameId> batch, int times) {
  for (int i = 0; i < times; ++i) {
    if (!pool.take(batch) || !pool.give(batch)) std::abort();
  }
}

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds of CPU a take and give, of the slowest of so many threads at once.
template <class Pool>
double measure(std::size_t n_frames, int n_threads) {
  const auto pool = half_used<Pool>().first;
  const int times = static_cast<int>(400'000 / n_frames);
  std::atomic<int> n_ready{0};
  std::vector<double> seconds(static_cast<std::size_t>(n_threads));
  const auto work = [&](double& mine) {
    std::vector<FrameId> batch(n_frames);
    take_and_give(*pool, batch, times / 10);
    ++n_ready;
    while (n_ready < n_threads) {
    }
    const double begin = thread_seconds();
    take_and_give(*pool, batch, times);
    mine = (thread_seconds() - begin) / times;
  };
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < seconds.size(); ++i) {
    others.emplace_back([&, i] { work(seconds[i]); });
  }
  work(seconds[0]);
  for (std::thread& other : others) other.join();
  return std::ranges::max(seconds);
}

// Runs of adjacent frames in a batch.
template <class Pool>
double runs_a_batch() {
  Batches batches = half_used<Pool>().second;
  std::size_t n_runs = 0;
  for (auto& batch : batches) {
    std::ranges::sort(batch);
    ++n_runs;
    for (std::size_t i = 1; i < batch.size(); ++i) n_runs += batch[i] != batch[i - 1].next();
  }
  return static_cast<double>(n_runs) / static_cast<double>(batches.size());
}

std::atomic<bool> is_stalled{false};

void sleep_5_ms() {
  timespec left{.tv_sec = 0, .tv_nsec = 5'000'000};
  nanosleep(&left, nullptr);
}

void stall(int) {
  is_stalled = true;
  sleep_5_ms();
  is_stalled = false;
}

// Takes and gives of one thread while another is stopped in the middle of one: wherever a signal
// finds it, or, with a mutex, where it holds that.
template <class Pool>
double done_beside_a_stalled_thread() {
  const auto pool = half_used<Pool>().first;
  std::atomic<bool> is_over{false};
  std::thread victim([&] {
    std::vector<FrameId> batch(1);
    while (!is_over) {
      if constexpr (requires { pool->stall_inside(); }) {
        pool->stall_inside();
        sleep_5_ms();
      } else {
        take_and_give(*pool, batch, 1);
      }
    }
  });
  std::uint64_t n_done = 0;
  std::thread worker([&] {
    std::vector<FrameId> batch(1);
    while (!is_over) {
      const bool was_stalled = is_stalled;
      take_and_give(*pool, batch, 1);
      n_done += was_stalled && is_stalled;
    }
  });
  for (int i = 0; i < kStalls; ++i) {
    if constexpr (!requires { pool->stall_inside(); }) {
      pthread_kill(victim.native_handle(), SIGUSR1);
    }
    sleep_5_ms();
    sleep_5_ms();
  }
  is_over = true;
  victim.join();
  worker.join();
  return static_cast<double>(n_done) / kStalls;
}

struct Case {
  std::string name;
  double (*run)();
  std::vector<double> samples = {};
};

template <class Pool, std::size_t kBatch, int kThreads>
double taken_and_given() {
  return measure<Pool>(kBatch, kThreads);
}

template <class Pool>
void add(std::vector<Case>& cases) {
  const std::string name = std::string(Pool::kName) + ", ";
  cases.push_back({name + "1 frame", taken_and_given<Pool, 1, 1>});
  cases.push_back({name + "16 frames", taken_and_given<Pool, 16, 1>});
  cases.push_back({name + "256 frames", taken_and_given<Pool, 256, 1>});
  cases.push_back({name + "1 frame, two threads", taken_and_given<Pool, 1, 2>});
  cases.push_back({name + "16 frames, two threads", taken_and_given<Pool, 16, 2>});
}

template <class Pool>
void print_others(int repeats) {
  bench::print_samples(std::string(Pool::kName) + ", runs in 16 frames", {runs_a_batch<Pool>()},
                       "runs");
  std::vector<double> done;
  for (int i = 0; i < repeats; ++i) done.push_back(done_beside_a_stalled_thread<Pool>());
  bench::print_samples(std::string(Pool::kName) + ", done beside a thread stalled for 5 ms", done,
                       "");
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  struct sigaction action{};
  action.sa_handler = stall;
  sigaction(SIGUSR1, &action, nullptr);

  std::vector<Case> cases;
  add<Ours>(cases);
  add<Locked<false>>(cases);
  add<Locked<true>>(cases);
#ifdef KVSPAN_BENCH_BOOST
  add<BoostStack>(cases);
#endif
  for (int i = 0; i < repeats; ++i) {
    for (Case& one : cases) one.samples.push_back(one.run());
  }
  for (const Case& one : cases) bench::print_samples(one.name, one.samples);
  print_others<Ours>(repeats);
  print_others<Locked<true>>(repeats);
}
