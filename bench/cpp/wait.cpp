// What share of a decode step the serving thread waits for the driver or the mapper, modelled: 256
// sequences of Llama-3-8B, steps of 20 ms, on the driver emulator's virtual clock with the
// published latencies. Not a GPU result.
//
// One thread plays two, so that every run gives the same. A step is: `batch.step`; the launches of
// the step, whose kernels last 20 ms together; the wait for the last of them. Meanwhile, on a clock
// of its own, the background takes its turns with the pauses of span/background.cpp. A turn comes
// to the context's lock before the launches of the step that it falls into, with no gap between its
// calls, so that a launch that meets it waits for all of it: no fair lock makes a step wait longer.
//
// What counts as waiting: all virtual time in `batch.step` (arrays copied to the device, and, where
// pages are missing, the calls that map them), and what launches wait for the lock.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "backend/cuda_backend.hpp"
#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "core/sizes.hpp"
#include "emulator.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr double kStepUs = 20'000;
constexpr double kBetweenUs = 100, kShortPauseUs = 500, kLongPauseUs = 2000;  // background.cpp
constexpr double kHostUsPerLaunch = 10;       // of an engine that launches eagerly
constexpr int kServing = 0, kBackground = 1;  // lanes
constexpr int kRows = 256;
constexpr int kWarmup = 64, kSteps = 1000;
constexpr Bytes kPage = kMiB * 2;
constexpr Bytes kCapacity = kMiB * 1024 * 112;

struct Scenario {
  const char* name;
  bool background;
  bool recycled;            // every frame exists before
  int launches;             // 1: the step is a captured graph
  bool aligned;             // all sequences cross into their next page in the same step
  bool shared_lock = true;  // of virtual-memory calls and launches
};

struct Outcome {
  std::vector<double> percent;  // of each step
  std::uint64_t n_grown_late = 0;
};

class Simulation {
 public:
  explicit Simulation(const Scenario& scenario)
      : scenario_(scenario),
        // No memory behind it: addresses only.
        emulator_(std::string("memory_free=1,memory=192GiB,context_lock=") +
                  (scenario.shared_lock ? "1" : "0")),
        store_(make_store(scenario)),
        cache_(make_cache(store_)) {
    emulator_.set_lane(kServing);
    if (scenario.recycled) store_->create_ahead(kCapacity);
    std::mt19937 random(1);
    std::uniform_real_distribution<double> magnitude(std::log(64), std::log(4096));
    std::vector<std::shared_ptr<Sequence>> rows;
    for (int i = 0; i < kRows; ++i) {
      const auto tokens = static_cast<std::int64_t>(std::exp(magnitude(random)));
      rows.push_back(cache_->sequence(Tokens(tokens), stream()));
      rows.back()->extend(Tokens(scenario.aligned ? tokens / 16 * 16 : tokens), stream());
    }
    batch_ = cache_->batch(std::move(rows), stream());
    emulator_.set_lane(kBackground);
    emulator_.set_lane(kServing);
  }

  Outcome run() {
    Outcome outcome;
    std::uint64_t late_before = 0;
    for (int i = 0; i < kWarmup + kSteps; ++i) {
      if (i == kWarmup) late_before = cache_->figures().n_grown_late;
      const double waited = step();
      if (i < kWarmup) continue;
      outcome.percent.push_back(100 * waited / kStepUs);
    }
    outcome.n_grown_late = cache_->figures().n_grown_late - late_before;
    return outcome;
  }

 private:
  static std::shared_ptr<FrameStore> make_store(const Scenario& scenario) {
    const SizeClass largest(scenario.recycled ? 0 : 6);
    return std::make_shared<FrameStore>(
        make_cuda_backend({.page_size = kPage, .capacity = kCapacity, .largest_class = largest}),
        kCapacity, largest, Bytes(kCapacity.value / 16));
  }

  static std::shared_ptr<Cache> make_cache(std::shared_ptr<FrameStore> store) {
    CacheOptions options;
    options.layers.assign(32, {.planes = {{"k", DType::bf16, 8, 128}, {"v", DType::bf16, 8, 128}}});
    options.max_seqs = kRows;
    options.max_seq_len = Tokens(8192);
    options.layers_per_page = 32;
    options.unmapped = Unmapped::fault;
    return Cache::make(std::move(store), options);
  }

  Stream stream() const { return {reinterpret_cast<std::uintptr_t>(emulator_.stream())}; }

  double step() {
    const double begin = emulator_.clock();
    catch_mapper(begin);
    batch_->step(Tokens(1), stream());
    double waited = emulator_.clock() - begin;
    if (scenario_.background) play_background(begin + kStepUs);
    const double locked = emulator_.lock_wait();
    const auto at = cache_->space()->lane_base(0) +
                    cache_->space()->slot_bytes(0) *
                        static_cast<std::uint64_t>(batch_->rows()[0]->slot().value);
    for (int i = 0; i < scenario_.launches; ++i) {
      if (scenario_.launches > 1) emulator_.advance(kHostUsPerLaunch);
      emulator_.launch(at.value, 4096, kStepUs / scenario_.launches);
    }
    waited += emulator_.lock_wait() - locked;
    emulator_.synchronize();
    return waited;
  }

  // A turn may last into this step. Whoever has room does not mind; if a row has none, the page
  // that the turn has mapped for it is only there when the turn is over.
  void catch_mapper(double begin) {
    if (mapped_until_ <= begin || !is_any_short_) return;
    emulator_.advance(mapped_until_ - begin);
  }

  void play_background(double until) {
    emulator_.set_lane(kBackground);
    while (emulator_.clock() < until) {
      is_any_short_ = std::ranges::any_of(batch_->rows(), [](const auto& row) {
        return row->length().value >= row->state()->capacity.load(std::memory_order_relaxed);
      });
      const WorkDone done = store_->background().piece();
      mapped_until_ = emulator_.clock();
      emulator_.advance(done.has_more       ? kBetweenUs
                        : done.n_frames > 0 ? kShortPauseUs
                                            : kLongPauseUs);
    }
    emulator_.set_lane(kServing);
  }

  const Scenario scenario_;
  const bench::Emulator emulator_;
  const std::shared_ptr<FrameStore> store_;
  const std::shared_ptr<Cache> cache_;
  std::shared_ptr<Batch> batch_;
  double mapped_until_ = 0;
  bool is_any_short_ = false;
};

}  // namespace

int main() {
  constexpr Scenario kScenarios[] = {
      {"background, recycled frames, graph", true, true, 1, false},
      {"background, recycled frames, graph, all cross at once", true, true, 1, true},
      {"background, recycled frames, 320 launches", true, true, 320, false},
      {"background, recycled frames, 320 launches, no shared lock", true, true, 320, false, false},
      {"background, new frames, graph", true, false, 1, false},
      {"background, new frames, 320 launches", true, false, 320, false},
      {"no background, recycled frames, graph", false, true, 1, false},
      {"no background, recycled frames, graph, all cross at once", false, true, 1, true},
      {"no background, new frames, graph", false, false, 1, false},
  };
  for (const Scenario& scenario : kScenarios) {
    const Outcome outcome = Simulation(scenario).run();
    bench::print_samples(scenario.name, outcome.percent, "%");
    bench::print_samples(std::string("steps that mapped, ") + scenario.name,
                         {static_cast<double>(outcome.n_grown_late)}, "");
  }
}
