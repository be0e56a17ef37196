// The frame pool beside other free lists: what taking and giving frames costs one thread and two,
// what goes on while a thread is stopped in the middle of it, in how many runs of adjacent frames a
// batch lies, and what a frame costs in memory.
//
// Times are of free lists in one of three states. "steady": all frames were free in random order,
// then requests of 1 to 32 came and went until half were in use. "scattered": a random half is in
// use, which leaves the pool no long runs. "steady, once shared": the pool's frames have all had
// two references before. Every list is checked before and after: all ids are there, once each.
#include <malloc.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "free_lists.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;
using namespace kvspan::bench;

constexpr std::uint32_t kFrames = 1 << 20;
constexpr std::uint32_t kManyFrames = 1 << 22;  // where memory is measured
constexpr std::size_t kLargest = 32;            // frames of a request
constexpr std::size_t kBatch = 16;
constexpr const char* kOnceShared = "steady, once shared";
constexpr auto kThreadsRun = std::chrono::milliseconds(20);
constexpr timespec kStall = {.tv_sec = 0, .tv_nsec = 5'000'000};

void require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Threads that are measured together run on one processor each.
void run_on(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(processor), &set);
  sched_setaffinity(0, sizeof set, &set);
}

double resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  double all = 0, resident = 0;
  statm >> all >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

std::size_t n_runs(std::span<FrameId> frames) {
  std::ranges::sort(frames);
  std::size_t n = 1;
  for (std::size_t i = 1; i < frames.size(); ++i) n += frames[i] != frames[i - 1].next();
  return n;
}

// The thread that is stopped notes what the other one did meanwhile. One at a time.
std::atomic<bool> in_operation{false}, stall_is_due{false}, stall_is_over{false};
std::atomic<std::uint64_t> n_done_by_other{0}, n_done_meanwhile{0};

void stall() {
  stall_is_due = false;
  const std::uint64_t before = n_done_by_other.load();
  timespec left = kStall;
  while (nanosleep(&left, &left) != 0) {
  }
  n_done_meanwhile = n_done_by_other.load() - before;
  stall_is_over = true;
}

void on_signal(int) {
  const int saved = errno;
  if (in_operation && stall_is_due) stall();
  errno = saved;
}

struct Samples {
  std::vector<double> values;
  const char* unit = "s";
};
std::map<std::string, Samples> measured;

void add(const std::string& name, double sample, const char* unit = "s") {
  measured[name].values.push_back(sample);
  measured[name].unit = unit;
}

// A free list in one of the two states, whatever its type.
class Subject {
 public:
  virtual ~Subject() = default;
  virtual void pairs(std::size_t n) = 0;
  virtual void mixed() = 0;
  virtual void threads(int n_threads, std::size_t n) = 0;
  virtual void stalled() = 0;
  virtual void runs() = 0;
  virtual void check() = 0;
};

template <class List>
class SubjectOf final : public Subject {
 public:
  SubjectOf(std::string name, std::string state)
      : name_(std::move(name)), state_(std::move(state)) {
    const bool steady = state_ != "scattered";
    std::vector<FrameId> all = take_all();
    if constexpr (std::is_same_v<List, FramePool>) {
      if (state_ == kOnceShared) {
        require(list_->share(all) == 0 && list_->give(all).freed == 0, name_);
      }
    }
    std::ranges::shuffle(all, random_);
    Worker<List> worker{*list_};
    if constexpr (Worker<List>::kChecks) {
      const FrameId twice[] = {all.back(), all.back(), FrameId(kSingle, kFrames)};
      FrameId again[1];
      require(worker.give(twice) == 2 && worker.take(again) && again[0] == all.back(), name_);
    }
    for (std::size_t i = 0; i < (steady ? kFrames : kFrames / 2); i += kBatch) {
      require(worker.give(std::span(all).subspan(i, kBatch)) == 0, name_);
    }
    if (steady) {
      held_.resize(kFrames / ((1 + kLargest) / 2));  // of which half hold frames at a time
      for (std::size_t i = 0; i < 10 * held_.size(); ++i) toggle(worker);
    } else {
      held_.emplace_back(all.begin() + kFrames / 2, all.end());
    }
  }

  // One thread, CPU time of a take and give of n.
  void pairs(std::size_t n) override {
    Worker<List> worker{*list_};
    std::vector<FrameId> frames(n);
    const std::size_t rounds = 200'000 / (n + 4);
    const double begin = cpu_seconds();
    for (std::size_t i = 0; i < rounds; ++i) pair(worker, frames);
    const double seconds = cpu_seconds() - begin;
    record("pair of " + std::to_string(n), seconds / static_cast<double>(rounds));
  }

  // One thread, CPU time a frame while requests come and go. Only for "steady".
  void mixed() override {
    Worker<List> worker{*list_};
    std::size_t n_frames = 0;
    const double begin = cpu_seconds();
    for (int i = 0; i < 5'000; ++i) n_frames += toggle(worker);
    record("mixed requests, a frame", (cpu_seconds() - begin) * 2 / static_cast<double>(n_frames));
  }

  void threads(int n_threads, std::size_t n) override {
    std::atomic<int> n_ready{0};
    std::atomic<bool> go{false}, stop{false};
    std::atomic<double> cpu{0}, n_done{0};
    std::vector<std::jthread> threads;
    for (int t = 0; t < n_threads; ++t) {
      threads.emplace_back([&, t] {
        run_on(t);
        Worker<List> worker{*list_};
        std::vector<FrameId> frames(n);
        std::uint64_t done = 0;
        ++n_ready;
        while (!go) std::this_thread::yield();
        const double begin = cpu_seconds();
        for (; !stop.load(std::memory_order_relaxed); ++done) pair(worker, frames);
        cpu += cpu_seconds() - begin;
        n_done += static_cast<double>(done);
      });
    }
    while (n_ready < n_threads) std::this_thread::yield();
    const double wall = timed([&] {
      go = true;
      std::this_thread::sleep_for(kThreadsRun);
      stop = true;
    });
    threads.clear();  // joins
    const std::string what =
        "pair of " + std::to_string(n) + ", threads: " + std::to_string(n_threads);
    record(what + ", wall", wall / n_done);
    record(what + ", CPU", cpu / n_done);
  }

  // Pairs that one thread completes while another one is stopped: with the mutex in its hands, or
  // else wherever in its operation a signal meets it.
  void stalled() override {
    std::atomic<bool> stop{false};
    const auto work = [&](auto before, auto after) {
      Worker<List> worker{*list_};
      std::array<FrameId, kBatch> frames;
      while (!stop) {
        before();
        pair(worker, frames);
        after();
      }
    };
    std::jthread other([&] {
      run_on(1);
      work([] {}, [] { n_done_by_other.fetch_add(1); });
    });
    std::jthread victim([&] {
      run_on(0);
      if constexpr (requires { list_->holding(stall); }) {
        const auto hold = [&] { return stall_is_due ? list_->holding(stall) : void(); };
        work(hold, [] {});
      } else {
        work([] { in_operation = true; }, [] { in_operation = false; });
      }
    });
    std::uniform_int_distribution<int> microseconds(100, 1000);
    for (int i = 0; i < 5; ++i) {
      stall_is_over = false;
      stall_is_due = true;
      while (!stall_is_over) {
        std::this_thread::sleep_for(std::chrono::microseconds(microseconds(random_)));
        if (stall_is_due) pthread_kill(victim.native_handle(), SIGUSR1);
      }
      record("pairs of 16 beside a stall of 5 ms", static_cast<double>(n_done_meanwhile), "");
    }
    stop = true;
  }

  void runs() override {
    Worker<List> worker{*list_};
    std::vector<std::array<FrameId, kBatch>> batches(1000);
    std::size_t n = 0;
    for (auto& batch : batches) {
      require(worker.take(batch), name_);
      n += n_runs(batch);
    }
    for (auto& batch : batches) worker.give(batch);
    record("runs of a batch of 16", static_cast<double>(n) / static_cast<double>(batches.size()),
           "");
  }

  // Ends the use of the list.
  void check() override {
    Worker<List> worker{*list_};
    for (const std::vector<FrameId>& frames : held_) worker.give(frames);
    take_all();
  }

 private:
  void record(const std::string& what, double sample, const char* unit = "s") {
    add(what + ", " + state_ + ", " + name_, sample, unit);
  }

  void pair(Worker<List>& worker, std::span<FrameId> frames) {
    if (!worker.take(frames) || worker.give(frames) != 0) require(false, name_ + " is wrong");
  }

  // A request goes, or another comes. Returns how many frames it has.
  std::size_t toggle(Worker<List>& worker) {
    std::vector<FrameId>& request = held_[random_() % held_.size()];
    const std::size_t n = request.empty() ? 1 + random_() % kLargest : request.size();
    if (request.empty()) {
      request.resize(n);
      require(worker.take(request), name_);
    } else {
      require(worker.give(request) == 0, name_);
      request.clear();
    }
    return n;
  }

  // By two threads at once. Requires that all are free: then each comes once.
  std::vector<FrameId> take_all() {
    std::array<std::vector<FrameId>, 2> taken;
    std::vector<std::jthread> threads;
    for (std::vector<FrameId>& mine : taken) {
      threads.emplace_back([&mine, this] {
        Worker<List> worker{*list_};
        std::array<FrameId, kBatch> batch;
        while (worker.take(batch)) mine.insert(mine.end(), batch.begin(), batch.end());
      });
    }
    threads.clear();  // joins
    std::vector<FrameId> all = std::move(taken[0]);
    all.insert(all.end(), taken[1].begin(), taken[1].end());
    // What one thread had in its hands the other did not find.
    Worker<List> worker{*list_};
    for (FrameId frame; worker.take({&frame, 1});) all.push_back(frame);
    std::ranges::sort(all);
    bool is_right = all.size() == kFrames;
    for (std::uint32_t i = 0; is_right && i < kFrames; ++i) {
      is_right = all[i] == FrameId(kSingle, i);
    }
    require(is_right, name_ + ": frames are lost, or there twice");
    return all;
  }

  const std::string name_, state_;
  std::unique_ptr<List> list_ = Worker<List>::make(kFrames);
  std::vector<std::vector<FrameId>> held_;
  std::minstd_rand random_{1};
};

// Resident memory once every frame has been taken and given back.
template <class List>
void measure_memory(const std::string& name) {
  std::vector<FrameId> frames(kManyFrames);
  malloc_trim(0);
  const double before = resident_bytes();
  const auto list = Worker<List>::make(kManyFrames);
  Worker<List> worker{*list};
  const auto batch = [&](std::size_t i) { return std::span(frames).subspan(i, kBatch); };
  for (std::size_t i = 0; i < kManyFrames; i += kBatch) require(worker.take(batch(i)), name);
  const double taken = resident_bytes();
  for (std::size_t i = 0; i < kManyFrames; i += kBatch) require(!worker.give(batch(i)), name);
  const double given = resident_bytes();
  add("resident bytes a frame, " + name, (given - before) / kManyFrames, "");
  if constexpr (std::is_same_v<List, FramePool>) {
    // Taking fresh frames touches the reference counts only, giving them back the bitmaps.
    add("of these the free list", (given - taken) / kManyFrames, "");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  struct sigaction action{};
  action.sa_handler = on_signal;
  sigaction(SIGUSR1, &action, nullptr);

  std::vector<std::unique_ptr<Subject>> steady, scattered;
  for_each_list(
      []<class List>(std::type_identity<List>, const char* name) { measure_memory<List>(name); });
  for_each_list([&]<class List>(std::type_identity<List>, const char* name) {
    steady.push_back(std::make_unique<SubjectOf<List>>(name, "steady"));
    scattered.push_back(std::make_unique<SubjectOf<List>>(name, "scattered"));
  });
  SubjectOf<FramePool> once_shared("frame pool", kOnceShared);
  const auto in_turn = [](auto& subjects, auto measure) {
    for (const auto& subject : subjects) measure(*subject);
    std::ranges::rotate(subjects, subjects.begin() + 1);  // another one is first next time
  };
  std::atomic<int> number{0};
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const double begin = cpu_seconds();
    for (int i = 0; i < 100'000; ++i) number.fetch_add(1);
    add("one atomic addition", (cpu_seconds() - begin) / 100'000);
    for (const std::size_t n : {1u, 16u, 256u}) {
      in_turn(steady, [&](Subject& subject) { subject.pairs(n); });
      in_turn(scattered, [&](Subject& subject) { subject.pairs(n); });
      once_shared.pairs(n);
    }
    in_turn(steady, [](Subject& subject) { subject.mixed(); });
    for (const std::size_t n : {1u, 16u}) {
      for (const int n_threads : {1, 2}) {
        in_turn(steady, [&](Subject& subject) { subject.threads(n_threads, n); });
      }
    }
    in_turn(steady, [](Subject& subject) { subject.stalled(); });
    in_turn(steady, [](Subject& subject) { subject.runs(); });
    in_turn(scattered, [](Subject& subject) { subject.runs(); });
  }
  in_turn(steady, [](Subject& subject) { subject.check(); });
  in_turn(scattered, [](Subject& subject) { subject.check(); });
  once_shared.check();
  for (const auto& [name, samples] : measured) print_samples(name, samples.values, samples.unit);
}
