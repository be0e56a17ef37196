// The pool's operations in every order that the memory model allows: pairs of them without bounds,
// more of them with few preemptions and stale loads. What takers and givers are told must be what
// they could have been told one after the other. Each check is proven by weakening one memory order
// of the pool, which it must find.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "explorer/explorer.hpp"
#include "pool/support.hpp"

using namespace kvspan;
using namespace kvspan_test::explorer;

BOOST_AUTO_TEST_SUITE(explored_pool)

namespace {

constexpr SizeClass kClass{0};

// Frames of a pool and the memory behind them. Whoever takes one uses its memory, and whoever gives
// it back has used it until then.
class Frames {
 public:
  explicit Frames(std::uint32_t n, std::uint32_t lend_from = IdPool::kLendFrom)
      : pool_(Pages(n), kClass, lend_from) {
    for (std::uint32_t i = 0; i < n; ++i) memory_.emplace_back("frame " + std::to_string(i));
  }

  // As many, or none.
  std::vector<FrameId> take(std::size_t n) {
    std::vector<FrameId> frames(n);
    Operation& operation = begin({.taken = n});
    operation.is_refused = !pool_.take(kClass, frames);
    operation.end = ++now_;
    if (operation.is_refused) return {};
    use(frames);
    return frames;
  }

  void give(std::span<const FrameId> frames) {
    use(frames);
    give_unused(frames);
  }
  void give_unused(std::span<const FrameId> frames) {
    Operation& operation = begin({});
    const FramePool::Given given = pool_.give(frames);
    operation.given = given.freed;
    operation.end = ++now_;
    require(given.refused == 0, "a frame in use is refused");
  }

  void use(std::span<const FrameId> frames) {
    for (const FrameId frame : frames) memory_[frame.index()].use();
  }

  // When all is done: so many are in use, all others can be had, and all that happened could have
  // happened one after the other.
  void check(std::size_t n_in_use) {
    require(has_order(memory_.size()), "no order of operations explains what they returned");
    const FramePool::Counts counts = pool_.counts(kClass);
    require(counts.in_use == n_in_use, "another number of frames is in use");
    require(counts.fresh + counts.free + n_in_use == memory_.size(), "frames are lost");
    require(take(memory_.size() - n_in_use).size() == memory_.size() - n_in_use,
            "a free frame cannot be had");
  }

  FramePool& pool() { return pool_; }

 private:
  struct Operation {
    std::size_t taken = 0, given = 0;
    bool is_refused = false;
    int begin = 0, end = 0;
    bool is_placed = false;
  };

  Operation& begin(Operation operation) {
    operation.begin = ++now_;
    return operations_.emplace_back(operation);
  }

  // Whether the operations that have no place yet can follow each other from here on, none before
  // one that had ended when it began (Herlihy and Wing, "Linearizability", TOPLAS 1990).
  bool has_order(std::size_t n_free) {
    int first_end = now_ + 1;
    for (const Operation& o : operations_) {
      if (!o.is_placed) first_end = std::min(first_end, o.end);
    }
    if (first_end > now_) return true;
    for (Operation& o : operations_) {
      if (o.is_placed || o.begin > first_end || o.is_refused != (o.taken > n_free)) continue;
      o.is_placed = true;
      const bool found = has_order(n_free + o.given - (o.is_refused ? 0 : o.taken));
      o.is_placed = false;
      if (found) return true;
    }
    return false;
  }

  FramePool pool_;
  std::vector<Memory> memory_;
  std::deque<Operation> operations_;
  int now_ = 0;
};

constexpr auto none_is_kept = [](std::uint32_t) { return false; };

// Ids that some hold, and others take.
void give_back(IdPool& pool, std::span<const FrameId> ids) {
  require(pool.give(ids, none_is_kept).refused == 0, "an id in use is refused");
}

Scenario a_frame_changes_hands() {
  const auto frames = std::make_shared<Frames>(1);
  const auto held = frames->take(1);
  const auto taken = std::make_shared<std::size_t>();
  return {{[=] { frames->give(held); }, [=] { *taken = frames->take(1).size(); }},
          [=] { frames->check(*taken); }};
}

// The first of two, held by so many, while the other one is free: no hint changes.
Scenario a_frame_changes_hands_beside_another(int n_holders) {
  const auto frames = std::make_shared<Frames>(2);
  const auto both = frames->take(2);
  const std::vector<FrameId> held{both[0]};
  frames->give(std::span(both).last(1));
  Scenario scenario;
  for (int i = 0; i < n_holders; ++i) {
    if (i > 0) require(frames->pool().share(held) == 0, "a frame in use is refused");
    // One holder at most has used it just now.
    scenario.threads.push_back([=] { i == 0 ? frames->give(held) : frames->give_unused(held); });
  }
  scenario.threads.push_back([=] { require(frames->take(1).size() == 1, "one of two frames"); });
  scenario.finally = [=] { frames->check(1); };
  return scenario;
}
Scenario one_holder() { return a_frame_changes_hands_beside_another(1); }
Scenario two_holders() { return a_frame_changes_hands_beside_another(2); }

// A word of the tree is emptied while another id of it comes back.
Scenario a_word_is_emptied_and_filled() {
  const auto pool = std::make_shared<IdPool>(kClass, 2u);
  std::vector<FrameId> ids(2);
  require(pool->take(ids), "two of two ids");
  give_back(*pool, std::span(ids).first(1));
  return {{[=] { give_back(*pool, std::span(ids).last(1)); },
           [=] {
             std::vector<FrameId> one(1);
             require(pool->take(one), "one of two ids, of which one is free");
           }},
          [=] {
            require(PoolTestPeer::hints_are_complete(*pool), "no hint leads to an id that is free");
          }};
}

// All that the pool does at once: one gives, two take, in ones and twos.
Scenario givers_and_takers() {
  const auto frames = std::make_shared<Frames>(3);
  const auto held = frames->take(2);
  const auto taken = std::make_shared<std::vector<std::size_t>>(2);
  const auto take = [=](std::size_t who, std::size_t n) {
    const auto got = frames->take(n);
    if (got.empty() || n == 2) {
      (*taken)[who] = got.size();
    } else {
      frames->give(got);
    }
  };
  return {{[=] {
             frames->give(std::span(held).first(1));
             frames->give(std::span(held).last(1));
           },
           [=] { take(0, 2); }, [=] { take(1, 1); }},
          [=] { frames->check((*taken)[0] + (*taken)[1]); }};
}

// Three frames: one in thread 0's magazine, and two in use.
struct Lent {
  std::shared_ptr<Frames> frames = std::make_shared<Frames>(3, 1);
  std::vector<FrameId> held = frames->take(3);

  Lent() {
    frames->give(std::span(held).first(2));
    held[0] = frames->take(1)[0];
    held.erase(held.begin() + 1);
  }

  // Thread i takes wanted[i] frames, if it gets them, or gives back as many.
  Scenario scenario(const std::vector<int>& wanted) const {
    Scenario scenario;
    const auto n_in_use = std::make_shared<std::size_t>(held.size());
    std::size_t n_given = 0;
    for (const int n : wanted) {
      if (n > 0) {
        scenario.threads.push_back([=, frames = frames] {
          *n_in_use += frames->take(static_cast<std::size_t>(n)).size();
        });
      } else {
        const std::vector<FrameId> given(held.begin() + static_cast<std::ptrdiff_t>(n_given),
                                         held.begin() + static_cast<std::ptrdiff_t>(n_given) - n);
        n_given += given.size();
        scenario.threads.push_back([=, frames = frames] { frames->give(given); });
      }
    }
    scenario.finally = [=, frames = frames] { frames->check(*n_in_use - n_given); };
    return scenario;
  }
};

Scenario both_want_what_is_lent() { return Lent{}.scenario({1, 1}); }
Scenario the_lender_gets_another() { return Lent{}.scenario({1, -1}); }
Scenario a_lent_word_is_given_to_and_recalled() { return Lent{}.scenario({-1, 2}); }
Scenario magazines() { return Lent{}.scenario({1, 2, -2}); }

// Two threads lend words to themselves, of which there is one.
Scenario both_lend() {
  const auto frames = std::make_shared<Frames>(3, 1);
  const auto held = frames->take(3);
  frames->give(held);
  const auto take = [=] { require(frames->take(1).size() == 1, "one of three frames"); };
  return {{take, take}, [=] { frames->check(2); }};
}

void holds(Scenario (*scenario)(), Bounds bounds) {
  const Outcome outcome = explore(scenario, bounds);
  BOOST_TEST(!outcome.fault, outcome.fault.value_or(""));
  BOOST_TEST_MESSAGE(outcome.n_executions << " executions");
}

void is_found(Scenario (*scenario)(), Weakening weakening, const std::string& fault,
              Bounds bounds = {}) {
  const Outcome outcome = explore(scenario, bounds, weakening);
  BOOST_REQUIRE_MESSAGE(outcome.fault, "nothing found for: " << fault);
  BOOST_TEST(outcome.fault->find(fault) != std::string::npos, *outcome.fault);
}

constexpr auto relaxed = std::memory_order_relaxed;
constexpr auto release = std::memory_order_release;
constexpr auto acq_rel = std::memory_order_acq_rel;
constexpr auto seq_cst = std::memory_order_seq_cst;

}  // namespace

BOOST_AUTO_TEST_CASE(pairs_of_operations) {
  holds(a_frame_changes_hands, {});
  holds(one_holder, {});
  holds(a_word_is_emptied_and_filled, {});
}

BOOST_AUTO_TEST_CASE(pairs_with_magazines) {
  holds(both_want_what_is_lent, {4, 2});
  holds(the_lender_gets_another, {4, 2});
  holds(a_lent_word_is_given_to_and_recalled, {4, 2});
  holds(both_lend, {4, 2});
}

BOOST_AUTO_TEST_CASE(three_threads) {
  holds(two_holders, {3, 1});
  holds(givers_and_takers, {3, 1});
  holds(magazines, {2, 1});
}

BOOST_AUTO_TEST_CASE(weaker_orders_are_found) {
  is_found(a_word_is_emptied_and_filled, {seq_cst, acq_rel}, "no hint leads");
  is_found(a_frame_changes_hands, {release, relaxed}, "does not come to an end");
  is_found(one_holder, {acq_rel, relaxed}, "data race");
  is_found(two_holders, {acq_rel, release}, "data race", {2, 1});
}

BOOST_AUTO_TEST_SUITE_END()
