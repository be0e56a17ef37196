// The histories of real threads, explained by the model of the pool. The load is that of threads
// that take, share, hand over and give a few frames of pools that have hardly more, so that most
// calls meet others and many takes are refused. Seeded; the interleaving is the machine's.
#include <boost/test/unit_test.hpp>

#include "pool/linearizability.hpp"
#include "pool/support.hpp"

using namespace kvspan_test;

namespace {

using Kind = Operation::Kind;
constexpr SizeClass kSingle{0};

FrameId frame(std::uint32_t index) { return FrameId(kSingle, index); }

struct Load {
  std::uint32_t n_frames;
  std::uint32_t lend_from;
  int n_threads;
  std::size_t n_operations;  // of each thread, in a round
  int n_rounds;

  static Load random(Random& random) {
    return {.n_frames = 2 + random.below(5),
            .lend_from = random.below(2) == 0 ? 1 : kvspan::IdPool::kLendFrom,
            .n_threads = 3 + static_cast<int>(random.below(2)),
            .n_operations = 4 + random.below(5),
            .n_rounds = 4};
  }
};

// One thread's operations. `held` are references that it may give.
template <class Pool>
void play(Recorder<Pool>& recorder, std::vector<FrameId>& held, std::size_t n_operations,
          Random& random) {
  constexpr std::size_t kMostHeld = 4;
  for (std::size_t i = 0; i < n_operations; ++i) {
    for (FrameId& reference : held) std::swap(reference, held[random.below(held.size())]);
    const std::size_t n = std::min<std::size_t>(1 + random.below(2), held.size());
    const auto some = std::span(held).last(n);
    if (random.below(kMostHeld) >= held.size()) {
      constexpr Kind kKinds[] = {Kind::take, Kind::take, Kind::take_recycled, Kind::take_fresh};
      const auto taken = recorder.take(kKinds[random.below(4)], 1 + random.below(3));
      held.insert(held.end(), taken.begin(), taken.end());
    } else if (random.below(4) == 0) {
      const std::vector<FrameId> shared(some.begin(), some.end());
      recorder.share(shared);
      held.insert(held.end(), shared.begin(), shared.end());
    } else if (random.below(4) == 0) {
      recorder.references(held.back());
    } else {
      recorder.give(some);
      held.resize(held.size() - n);
    }
  }
}

// What is not explained, if anything.
template <class Pool>
std::optional<std::string> play(Pool& pool, PoolModel model, const Load& load, Random& random) {
  const auto n_threads = static_cast<std::size_t>(load.n_threads);
  std::vector<std::vector<FrameId>> held(n_threads);
  for (int round = 0; round < load.n_rounds; ++round) {
    std::vector<Recorder<Pool>> recorders;
    std::vector<Random> randoms;
    for (std::size_t i = 0; i < n_threads; ++i) {
      recorders.emplace_back(pool, load.n_operations);
      randoms.emplace_back(random.below(1u << 31));
    }
    run_threads(load.n_threads, [&](int thread) {
      const auto i = static_cast<std::size_t>(thread);
      play(recorders[i], held[i], load.n_operations, randoms[i]);
    });
    std::vector<Log> logs;
    for (const Recorder<Pool>& recorder : recorders) logs.push_back(recorder.log());
    if (auto unexplained = find_unexplained(logs, model)) return unexplained;
    for (std::uint32_t i = 0; i < load.n_frames; ++i) {
      if (pool.references(frame(i)) != model.references(i)) {
        return "frame " + std::to_string(i) + " is left with other references";
      }
    }
    const FramePool::Counts left = pool.counts(kSingle), expected = model.counts();
    if (left.fresh != expected.fresh || left.free != expected.free) return "other counts are left";
    // References change hands.
    std::vector<std::vector<FrameId>> dealt(n_threads);
    for (const std::vector<FrameId>& references : held) {
      for (const FrameId reference : references) {
        dealt[random.below(n_threads)].push_back(reference);
      }
    }
    held = std::move(dealt);
  }
  return std::nullopt;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(linearizability)

BOOST_AUTO_TEST_CASE(histories_of_threads_are_explained) {
  for (std::uint64_t seed = 0; seed < (kSanitized ? 200 : 1000); ++seed) {
    Random random(seed);
    const Load load = Load::random(random);
    FramePool pool(Pages(load.n_frames), kSingle, load.lend_from);
    PoolModel model(load.n_frames, load.lend_from <= load.n_frames);
    const std::optional<std::string> unexplained = play(pool, model, load, random);
    BOOST_TEST(!unexplained, "seed " << seed << ": " << unexplained.value_or(""));
  }
}

BOOST_AUTO_TEST_SUITE_END()
