// The explorer itself, on the litmus tests of the literature: what may be seen is, and nothing
// else.
#include <boost/test/unit_test.hpp>
#include <memory>
#include <set>
#include <utility>

#include "explorer/atomics.hpp"

using namespace kvspan_test::explorer;

BOOST_AUTO_TEST_SUITE(explorer)

namespace {

constexpr auto relaxed = std::memory_order_relaxed;
constexpr auto acquire = std::memory_order_acquire;
constexpr auto release = std::memory_order_release;
constexpr auto acq_rel = std::memory_order_acq_rel;
constexpr auto seq_cst = std::memory_order_seq_cst;

struct State {
  kvspan::Atomic<int> x{0}, y{0};
  int a = -1, b = -1, c = -1, d = -1;
};

using Seen = std::set<std::pair<int, int>>;

// What (a, b) can be after threads that are given a state.
template <class... Threads>
Seen outcomes(Threads... threads) {
  Seen seen;
  const Outcome outcome = explore([&] {
    const auto state = std::make_shared<State>();
    return Scenario{{[=] { threads(*state); }...},
                    [&seen, state] { seen.insert({state->a, state->b}); }};
  });
  BOOST_TEST(!outcome.fault);
  return seen;
}

Seen store_buffering(std::memory_order order) {
  return outcomes(
      [=](State& s) {
        s.x.fetch_or(1, order);
        s.a = s.y.load(order == acq_rel ? acquire : order);
      },
      [=](State& s) {
        s.y.fetch_or(1, order);
        s.b = s.x.load(order == acq_rel ? acquire : order);
      });
}

Seen message_passing(std::memory_order stored, std::memory_order loaded) {
  return outcomes(
      [=](State& s) {
        s.x.store(1, relaxed);
        s.y.store(1, stored);
      },
      [=](State& s) {
        s.a = s.y.load(loaded);
        s.b = s.x.load(relaxed);
      });
}

}  // namespace

BOOST_AUTO_TEST_CASE(store_buffering_needs_sequential_consistency) {
  BOOST_TEST((store_buffering(seq_cst) == Seen{{0, 1}, {1, 0}, {1, 1}}));
  BOOST_TEST((store_buffering(acq_rel) == Seen{{0, 0}, {0, 1}, {1, 0}, {1, 1}}));
}

BOOST_AUTO_TEST_CASE(a_message_is_passed_by_release_and_acquire) {
  const Seen all{{0, 0}, {0, 1}, {1, 0}, {1, 1}}, ordered{{0, 0}, {0, 1}, {1, 1}};
  BOOST_TEST((message_passing(release, acquire) == ordered));
  BOOST_TEST((message_passing(seq_cst, seq_cst) == ordered));
  BOOST_TEST((message_passing(relaxed, acquire) == all));
  BOOST_TEST((message_passing(release, relaxed) == all));
}

BOOST_AUTO_TEST_CASE(an_exchange_goes_on_with_a_release) {
  const Seen seen = outcomes(
      [](State& s) {
        s.x.store(1, relaxed);
        s.y.store(1, release);
      },
      [](State& s) { s.y.fetch_add(1, relaxed); },
      [](State& s) {
        s.a = s.y.load(acquire);
        s.b = s.x.load(relaxed);
      });
  BOOST_TEST((seen == Seen{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {2, 1}}));
}

BOOST_AUTO_TEST_CASE(loads_of_one_location_do_not_go_back) {
  const Seen seen = outcomes(
      [](State& s) {
        s.x.store(1, relaxed);
        s.x.store(2, relaxed);
      },
      [](State& s) {
        s.a = s.x.load(relaxed);
        s.b = s.x.load(relaxed);
      });
  BOOST_TEST((seen == Seen{{0, 0}, {0, 1}, {0, 2}, {1, 1}, {1, 2}, {2, 2}}));
}

BOOST_AUTO_TEST_CASE(independent_writes_are_seen_in_one_order_if_sequential) {
  const auto in_two_orders = [](std::memory_order order) {
    bool is_possible = false;
    const auto loaded = order == seq_cst ? seq_cst : acquire;
    const Outcome outcome = explore([&] {
      const auto s = std::make_shared<State>();
      return Scenario{
          {[=] { s->x.store(1, order); }, [=] { s->y.store(1, order); },
           [=] {
             s->a = s->x.load(loaded);
             s->b = s->y.load(loaded);
           },
           [=] {
             s->c = s->y.load(loaded);
             s->d = s->x.load(loaded);
           }},
          [&is_possible, s] { is_possible |= s->a == 1 && s->b == 0 && s->c == 1 && s->d == 0; }};
    });
    BOOST_TEST(!outcome.fault);
    return is_possible;
  };
  BOOST_TEST(in_two_orders(release));
  BOOST_TEST(!in_two_orders(seq_cst));
}

BOOST_AUTO_TEST_CASE(exchanges_lose_nothing) {
  const Outcome outcome = explore([] {
    const auto s = std::make_shared<State>();
    const auto add = [=] {
      int seen = s->x.load(relaxed);
      while (!s->x.compare_exchange_weak(seen, seen + 1, relaxed, relaxed)) {
      }
    };
    return Scenario{{add, add, add},
                    [=] { require(s->x.load(relaxed) == 3, "an addition is lost"); }};
  });
  BOOST_TEST(!outcome.fault);
  BOOST_TEST(outcome.n_executions >= 90);  // 6! / (2! 2! 2!), were there no retries
}

BOOST_AUTO_TEST_CASE(faults_are_found_and_told) {
  const auto passing = [](std::memory_order stored) {
    return explore([=] {
      const auto s = std::make_shared<State>();
      const auto memory = std::make_shared<Memory>("the frame");
      return Scenario{{[=] {
                         memory->use();
                         s->x.store(1, stored);
                       },
                       [=] {
                         if (s->x.load(acquire) == 1) memory->use();
                       }}};
    });
  };
  BOOST_TEST(!passing(release).fault);
  const Outcome raced = passing(relaxed);
  BOOST_REQUIRE(raced.fault);
  BOOST_TEST(raced.fault->find("data race") != std::string::npos);
  BOOST_TEST(raced.fault->find("thread 0: store of location 0, 1, relaxed") != std::string::npos);

  const Outcome endless = explore([] {
    const auto s = std::make_shared<State>();
    return Scenario{{[=] {
      while (s->x.load(relaxed) == 0) {
      }
    }}};
  });
  BOOST_REQUIRE(endless.fault);
  BOOST_TEST(endless.fault->find("does not come to an end") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(bounds_bound) {
  const auto executions = [](Bounds bounds) {
    return explore(
               [] {
                 const auto s = std::make_shared<State>();
                 const auto both = [=] {
                   s->x.fetch_add(1, acq_rel);
                   s->a = s->y.load(relaxed);
                   s->y.fetch_add(1, acq_rel);
                 };
                 return Scenario{{both, both}};
               },
               bounds)
        .n_executions;
  };
  BOOST_TEST(executions({0, 0}) == 2);              // one after the other, in either order
  BOOST_TEST(executions({Bounds::kAll, 0}) == 20);  // six operations, three of them first's
  BOOST_TEST(executions({}) > 20);
}

BOOST_AUTO_TEST_SUITE_END()
