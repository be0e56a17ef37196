// The histories of real threads, explained by the model of the pool. The load is that of threads
// that take, share, hand over and give a few frames of pools that have hardly more, so that most
// calls meet others and many takes are refused. Seeded; the interleaving is the machine's.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <mutex>

#include "pool/linearizability.hpp"
#include "pool/support.hpp"

using namespace kvspan_test;

namespace {

using Kind = Operation::Kind;
constexpr SizeClass kSingle{0};

FrameId frame(std::uint32_t index) { return FrameId(kSingle, index); }

struct Load {
  std::uint32_t n_in_use;  // for good: the others lie in one word of the pool's tree, or in two
  std::uint32_t n_frames;  // with those
  std::uint32_t lend_from;
  int n_threads;
  std::size_t n_operations;  // of each thread, in a round
  std::size_t most_held;     // by each, when it takes more
  int n_rounds = 4;

  static Load random(Random& random) {
    const std::uint32_t n_in_use = random.below(2) * 30;
    return {.n_in_use = n_in_use,
            .n_frames = n_in_use + 2 + random.below(5),
            .lend_from = random.below(2) == 0 ? 1 : kvspan::IdPool::kLendFrom,
            .n_threads = 3 + static_cast<int>(random.below(2)),
            .n_operations = 4 + random.below(60),
            .most_held = 1 + random.below(4)};
  }
};

// One thread's operations. `held` are references that it may give.
template <class Pool>
void play(Recorder<Pool>& recorder, std::vector<FrameId>& held, const Load& load, Random& random) {
  for (std::size_t i = 0; i < load.n_operations; ++i) {
    if (random.below(load.most_held) >= held.size()) {
      constexpr Kind kKinds[] = {Kind::take, Kind::take, Kind::take_recycled, Kind::take_fresh};
      const auto taken = recorder.take(kKinds[random.below(4)], 1 + random.below(3));
      held.insert(held.end(), taken.begin(), taken.end());
      continue;
    }
    if (held.empty()) continue;
    std::swap(held[random.below(held.size())], held.back());
    const std::size_t n = std::min<std::size_t>(1 + random.below(2), held.size());
    const auto some = std::span(held).last(n);
    const std::uint32_t kind = random.below(8);
    if (kind == 0) {
      recorder.references(held.back());
    } else if (kind < 4 && held.size() < 2 * load.most_held) {
      const std::vector<FrameId> shared(some.begin(), some.end());
      recorder.share(shared);
      held.insert(held.end(), shared.begin(), shared.end());
    } else {
      recorder.give(some);
      held.resize(held.size() - n);
    }
  }
}

// A take may also be refused because it waited for another one, which was stopped while it lent a
// word, and gave up (kPatience in id_pool.cpp; that takes longer than here). Such a refusal changes
// nothing and is left out.
void leave_out_what_gave_up(std::vector<Log>& logs) {
  constexpr Operation::Stamp kGivesUpAfter = 200'000;  // ns
  const auto gave_up = [&](const Log& own, const Operation& o) {
    const Operation::Stamp waiting = o.end - kGivesUpAfter;
    if (!o.is_refused || o.begin > waiting) return false;
    return std::ranges::any_of(logs, [&](const Log& log) {
      return &log != &own && std::ranges::any_of(log, [&](const Operation& other) {
        return other.is_take() && !other.is_refused && other.begin < waiting && other.end > waiting;
      });
    });
  };
  for (Log& log : logs) std::erase_if(log, [&](const Operation& o) { return gave_up(log, o); });
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
      play(recorders[i], held[i], load, randoms[i]);
    });
    std::vector<Log> logs;
    for (const Recorder<Pool>& recorder : recorders) logs.push_back(recorder.log());
    leave_out_what_gave_up(logs);
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

// A pool that looks for frames, and takes them when others may have.
class CheckThenActPool {
 public:
  explicit CheckThenActPool(std::uint32_t n_frames) : references_(n_frames), n_fresh_(n_frames) {}

  bool take(SizeClass, std::span<FrameId> out) { return take(out, true, true); }
  bool take_recycled(SizeClass, std::span<FrameId> out) { return take(out, true, false); }
  bool take_fresh(SizeClass, std::span<FrameId> out) { return take(out, false, true); }

  std::uint32_t share(std::span<const FrameId> frames) {
    const std::lock_guard lock(mutex_);
    for (const FrameId shared : frames) ++references_[shared.index()];
    return 0;
  }
  FramePool::Given give(std::span<const FrameId> frames) {
    const std::lock_guard lock(mutex_);
    FramePool::Given given;
    for (const FrameId id : frames) {
      std::uint32_t& n_references = references_[id.index()];
      given.refused += n_references == 0;
      given.freed += n_references == 1;
      n_references -= n_references != 0;
    }
    return given;
  }
  std::uint32_t references(FrameId id) {
    const std::lock_guard lock(mutex_);
    return references_[id.index()];
  }
  FramePool::Counts counts(SizeClass) {
    const std::lock_guard lock(mutex_);
    const auto n_unused = std::count(references_.begin(), references_.end(), 0u);
    return {.fresh = n_fresh_, .free = static_cast<std::uint64_t>(n_unused) - n_fresh_};
  }

 private:
  bool take(std::span<FrameId> out, bool has_recycled, bool has_fresh) {
    std::vector<FrameId> found;
    {
      const std::lock_guard lock(mutex_);
      const auto bump = static_cast<std::uint32_t>(references_.size()) - n_fresh_;
      for (std::uint32_t i = 0; i < references_.size() && found.size() < out.size(); ++i) {
        if (references_[i] == 0 && (i < bump ? has_recycled : has_fresh)) found.push_back(frame(i));
      }
    }
    if (found.size() < out.size()) return false;
    std::this_thread::yield();
    const std::lock_guard lock(mutex_);
    for (const FrameId id : found) {
      references_[id.index()] = 1;
      n_fresh_ =
          std::min(n_fresh_, static_cast<std::uint32_t>(references_.size()) - id.index() - 1);
    }
    std::copy(found.begin(), found.end(), out.begin());
    return true;
  }

  std::mutex mutex_;
  std::vector<std::uint32_t> references_;
  std::uint32_t n_fresh_;
};

std::optional<std::string> play_careless(std::uint64_t seed, int n_threads) {
  Random random(seed);
  Load load = Load::random(random);
  load.n_threads = n_threads;
  load.n_frames -= load.n_in_use;
  CheckThenActPool pool(load.n_frames);
  return play(pool, PoolModel(load.n_frames, 0, false), load, random);
}

using Indices = std::initializer_list<std::uint32_t>;
using Stamp = Operation::Stamp;

Operation operation(Kind kind, Indices frames, std::uint32_t result, Stamp begin, Stamp end) {
  Operation made{.kind = kind, .result = result, .begin = begin, .end = end};
  for (const std::uint32_t index : frames) made.named[made.n_frames++] = frame(index);
  return made;
}
Operation taken(Indices frames, Stamp begin, Stamp end) {
  return operation(Kind::take, frames, 0, begin, end);
}
Operation refused(Kind kind, std::size_t n, Stamp begin, Stamp end) {
  return {.kind = kind, .n_frames = n, .is_refused = true, .begin = begin, .end = end};
}
Operation shared(std::uint32_t index, Stamp begin, Stamp end) {
  return operation(Kind::share, {index}, 0, begin, end);
}
Operation given(Indices frames, std::uint32_t freed, Stamp begin, Stamp end) {
  return operation(Kind::give, frames, freed, begin, end);
}
Operation referenced(std::uint32_t index, std::uint32_t n, Stamp begin, Stamp end) {
  return operation(Kind::references, {index}, n, begin, end);
}

// Each thread's operations.
bool is_explained(PoolModel before, const std::vector<Log>& logs) {
  return !find_unexplained(logs, before);
}
PoolModel all_fresh(std::uint32_t n_frames) { return PoolModel(n_frames, 0, false); }
PoolModel all_in_use(std::uint32_t n_frames) { return PoolModel(n_frames, n_frames, false); }

}  // namespace

BOOST_AUTO_TEST_SUITE(linearizability)

BOOST_AUTO_TEST_CASE(histories_of_threads_are_explained) {
  for (std::uint64_t seed = 0; seed < (kSanitized ? 500 : 2000); ++seed) {
    Random random(seed);
    const Load load = Load::random(random);
    FramePool pool(Pages(load.n_frames), kSingle, load.lend_from);
    const bool has_begun = take(pool, kSingle, load.n_in_use).size() == load.n_in_use;
    BOOST_TEST_REQUIRE(has_begun);
    const PoolModel model(load.n_frames, load.n_in_use, load.lend_from <= load.n_frames);
    const std::optional<std::string> unexplained = play(pool, model, load, random);
    BOOST_TEST_REQUIRE(!unexplained, "seed " << seed << ": " << unexplained.value_or(""));
  }
}

BOOST_AUTO_TEST_CASE(a_pool_that_checks_before_it_acts_is_refused) {
  std::uint64_t n_refused = 0;
  for (std::uint64_t seed = 0; seed < 100 && n_refused == 0; ++seed) {
    const std::optional<std::string> alone = play_careless(seed, 1);
    BOOST_TEST(!alone, "seed " << seed << ": " << alone.value_or(""));
    n_refused += play_careless(seed, 4).has_value();
  }
  BOOST_TEST(n_refused == 1u);
}

BOOST_AUTO_TEST_CASE(one_frame_taken_by_two_is_refused) {
  BOOST_TEST(!is_explained(all_fresh(2), {{taken({0}, 0, 9)}, {taken({0}, 5, 15)}}));
  const Log recycled{given({0}, 1, 0, 1)};
  BOOST_TEST(!is_explained(
      all_in_use(2), {recycled, {taken({0}, 2, 9)}, {taken({0}, 2, 9), given({0}, 1, 10, 11)}}));
}

BOOST_AUTO_TEST_CASE(a_refusal_where_enough_were_free_all_along_is_refused) {
  const Log other{taken({0}, 0, 9), given({0}, 1, 10, 20)};
  BOOST_TEST(!is_explained(all_fresh(3), {other, {refused(Kind::take, 2, 5, 15)}}));
  BOOST_TEST(is_explained(all_fresh(2), {other, {refused(Kind::take, 2, 5, 15)}}));
  const Log recycled{given({0}, 1, 0, 1)};
  BOOST_TEST(!is_explained(all_in_use(1), {recycled, {refused(Kind::take_recycled, 1, 2, 3)}}));
  BOOST_TEST(is_explained(all_in_use(1), {recycled, {refused(Kind::take_recycled, 1, 1, 3)}}));
}

BOOST_AUTO_TEST_CASE(a_take_of_more_than_there_are_is_refused) {
  BOOST_TEST(!is_explained(all_fresh(1), {{taken({0, 1}, 0, 1)}}));
  const Log other{taken({0}, 0, 1), given({0}, 1, 9, 10)};
  BOOST_TEST(!is_explained(all_fresh(2), {other, {taken({0, 1}, 2, 8)}}));
  BOOST_TEST(is_explained(all_fresh(2), {other, {taken({0, 1}, 2, 9)}}));
  BOOST_TEST(!is_explained(all_fresh(1), {{operation(Kind::take_recycled, {0}, 0, 0, 1)}}));
}

BOOST_AUTO_TEST_CASE(a_frame_freed_while_it_has_a_holder_is_refused) {
  const Log holder{shared(0, 0, 1)};
  BOOST_TEST(!is_explained(all_in_use(1), {holder, {given({0}, 1, 2, 3)}}));
  // Of two, one is the last.
  for (const std::uint32_t n : {0u, 1u}) {
    BOOST_TEST(
        !is_explained(all_in_use(1), {holder, {given({0}, n, 2, 9)}, {given({0}, n, 2, 9)}}));
  }
  BOOST_TEST(is_explained(all_in_use(1), {holder, {given({0}, 0, 2, 9)}, {given({0}, 1, 2, 9)}}));
}

BOOST_AUTO_TEST_CASE(a_stale_number_of_references_is_refused) {
  BOOST_TEST(!is_explained(all_in_use(1), {{shared(0, 0, 1)}, {referenced(0, 1, 2, 3)}}));
  BOOST_TEST(is_explained(all_in_use(1), {{shared(0, 0, 2)}, {referenced(0, 1, 1, 3)}}));
  const Log back{referenced(0, 2, 1, 2), referenced(0, 1, 3, 4)};
  BOOST_TEST(!is_explained(all_in_use(1), {{shared(0, 0, 9)}, back}));
}

BOOST_AUTO_TEST_CASE(what_ended_earlier_comes_first) {
  BOOST_TEST(!is_explained(all_fresh(1), {{taken({0}, 2, 3)}, {refused(Kind::take, 1, 0, 1)}}));
  BOOST_TEST(is_explained(all_fresh(1), {{taken({0}, 2, 3)}, {refused(Kind::take, 1, 0, 2)}}));
  // Also where others overlap both.
  const Log long_one{referenced(0, 0, 0, 9)};
  BOOST_TEST(
      !is_explained(all_fresh(1), {{taken({0}, 2, 3)}, {refused(Kind::take, 1, 0, 1)}, long_one}));
}

BOOST_AUTO_TEST_CASE(a_fresh_frame_before_a_recycled_one_is_refused) {
  const Log log{taken({0}, 0, 1), given({0}, 1, 2, 3), taken({1}, 4, 5)};
  BOOST_TEST(!is_explained(all_fresh(2), {log}));
  BOOST_TEST(is_explained(PoolModel(2, 0, true), {log}));  // 0 may be lent again and again
}

BOOST_AUTO_TEST_CASE(overlapping_operations_are_reordered) {
  // What began last comes first.
  BOOST_TEST(is_explained(all_in_use(1), {{taken({0}, 0, 9), referenced(0, 1, 10, 11)},
                                          {refused(Kind::take, 1, 1, 9), given({0}, 1, 10, 19)},
                                          {given({0}, 1, 2, 9)},
                                          {taken({0}, 12, 18)}}));
  BOOST_TEST(is_explained(all_in_use(1), {{shared(0, 0, 9), referenced(0, 3, 10, 11)},
                                          {referenced(0, 1, 1, 2), referenced(0, 2, 3, 4)},
                                          {referenced(0, 2, 5, 6), shared(0, 7, 9)}}));
}

// 1 is given to a pool that has 0, for which there is a taker; it gets 1.
BOOST_AUTO_TEST_CASE(a_taker_may_get_what_is_given_after_its_admission) {
  const std::vector<Log> logs{{given({0}, 1, 0, 1), taken({1}, 2, 20)},
                              {refused(Kind::take, 1, 3, 4), given({1}, 1, 5, 6)},
                              {taken({0}, 7, 8)}};
  BOOST_TEST(is_explained(all_in_use(2), logs));
}

BOOST_AUTO_TEST_CASE(a_batch_is_given_one_by_one) {
  const Log others{shared(0, 0, 1), shared(1, 2, 3), given({0, 1}, 0, 4, 9)};
  BOOST_TEST(
      is_explained(all_in_use(2), {others, {referenced(0, 1, 5, 6), referenced(1, 2, 7, 8)}}));
  BOOST_TEST(
      !is_explained(all_in_use(2), {others, {referenced(1, 1, 5, 6), referenced(0, 2, 7, 8)}}));
}

BOOST_AUTO_TEST_SUITE_END()
