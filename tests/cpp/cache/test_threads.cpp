// Threads on two caches of one small pool, so that they take frames from each other all the time;
// each checks the bytes of its own sequences. Modelled on an engine with a scheduler thread a
// model.
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <random>
#include <thread>

#include "cache/rig.hpp"

namespace kvspan::test {
namespace {

constexpr auto kDuration = std::chrono::milliseconds(500);

// One thread's life; returns whether every byte was right.
bool live(Rig& rig, std::int32_t mark, std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<std::shared_ptr<Sequence>> mine;
  bool ok = true;
  const auto end = std::chrono::steady_clock::now() + kDuration;
  while (std::chrono::steady_clock::now() < end) {
    try {
      const int choice = below(10);
      if (mine.empty() || choice == 0) {
        mine.push_back(rig.cache->sequence(Tokens(below(200))));
        continue;
      }
      if (choice == 8) {
        mine.push_back(rig.cache->sequence(token_ids(mark, below(400)), "", Tokens(0)));
        ok = ok && rig.holds(*mine.back(), mark, 0, mine.back()->length().value);
        continue;
      }
      auto& s = mine[static_cast<std::size_t>(below(static_cast<int>(mine.size())))];
      const std::int64_t length = s->length().value;
      if (choice < 4) {
        s->extend(Tokens(1 + below(150)), {});
        rig.write(*s, mark, length, s->length().value);
      } else if (choice == 4) {
        s->truncate(Tokens(below(static_cast<int>(length) + 1)), {});
      } else if (choice == 5) {
        auto child = s->fork(1, {}, {}).front();
        ok = ok && rig.holds(*child, mark, 0, length);
        mine.push_back(std::move(child));
      } else if (choice == 9) {
        s->publish(token_ids(mark, length), below(2) == 0, {});
        ok = ok && rig.holds(*s, mark, 0, length);
      } else if (choice == 6) {
        const auto batch = rig.cache->batch(mine);
        batch->step(Tokens(1), {});
        for (const auto& row : mine) {
          rig.write(*row, mark, row->length().value - 1, row->length().value);
        }
      } else {
        ok = ok && rig.holds(*s, mark, 0, length);
        s = mine.back();
        mine.pop_back();
      }
      if (below(20) == 0) rig.cache->trim();
      if (below(20) == 0) rig.cache->page_map();
      if (below(20) == 0) rig.cache->figures();
    } catch (const OutOfMemory&) {
      mine.clear();
    } catch (const CapacityError&) {
      mine.clear();
    }
  }
  for (const auto& s : mine) ok = ok && rig.holds(*s, mark, 0, s->length().value);
  return ok;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(threads)

void share_a_pool(std::uint8_t largest_class) {
  Rig first({.n_pages = 60, .largest_class = largest_class, .max_seqs = 16, .keep = kGiB});
  Rig second = first;  // the same pool, another cache
  second.cache = Cache::make(first.store, first.cache_options);
  std::atomic<int> n_right{0};
  std::vector<std::thread> threads;
  for (std::int32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      // The same tokens in both threads of a cache: what one publishes the other begins with.
      n_right += live(i % 2 == 0 ? first : second, i % 2 + 1, static_cast<std::uint32_t>(i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  BOOST_TEST(n_right.load() == 4);
  BOOST_TEST(first.backend->violations().empty());
  second.cache->close();
  first.cache->trim();
  BOOST_TEST((first.cache->figures().mapped == Bytes(0)));
  BOOST_TEST((first.cache->figures().shared == Bytes(0)));
  BOOST_TEST((first.store->counts().in_use == Bytes(0)));
}

BOOST_AUTO_TEST_CASE(caches_of_one_pool_take_frames_from_each_other) { share_a_pool(0); }

BOOST_AUTO_TEST_CASE(caches_of_one_pool_with_large_frames) { share_a_pool(2); }

BOOST_AUTO_TEST_CASE(two_threads_on_one_sequence_are_told_so) {
  Rig rig({.n_pages = 64});
  const auto shared = rig.cache->sequence(Tokens(0));
  std::atomic<std::int64_t> grown{0};
  std::atomic<int> n_busy{0};
  std::atomic<bool> stop{false};
  const auto work = [&] {
    while (!stop) {
      try {
        shared->extend(Tokens(1), {});
        ++grown;
      } catch (const BusyError&) {
        ++n_busy;
      } catch (const CapacityError&) {
        stop = true;
      }
    }
  };
  // Deterministic: the second call comes while the first one holds the claim.
  {
    const Claimed claimed(*shared->state());
    BOOST_CHECK_THROW(shared->extend(Tokens(1), {}), BusyError);
    BOOST_CHECK_THROW(shared->truncate(Tokens(0), {}), BusyError);
  }
  std::thread one(work), two(work);
  one.join();
  two.join();
  BOOST_TEST(shared->length().value == grown.load());
  BOOST_TEST(grown.load() == 1000);
}

BOOST_AUTO_TEST_CASE(closing_waits_for_calls_under_way) {
  Rig rig({.n_pages = 60, .max_seqs = 16});
  std::vector<std::thread> threads;
  for (std::int32_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      try {
        live(rig, i + 1, static_cast<std::uint32_t>(i) + 10);
      } catch (const ReleasedError&) {
      }
    });
  }
  std::this_thread::sleep_for(kDuration / 3);
  // Held meanwhile, as by a tensor: writes through it stay harmless after close.
  const auto space = rig.cache->space();
  rig.cache->close();
  for (std::thread& thread : threads) thread.join();
  BOOST_CHECK_THROW(rig.cache->figures(), ReleasedError);
  BOOST_TEST(rig.backend->violations().empty());
}

// Rows that select repeats are new sequences: a close at the same time must end those, too.
BOOST_AUTO_TEST_CASE(closing_ends_the_rows_that_a_select_makes_meanwhile) {
  for (int i = 0; i < 60; ++i) {
    Rig rig;
    const auto batch = rig.cache->adjacent_batch(4);
    batch->step(Tokens(100), {});
    std::atomic<bool> is_running{false};
    std::thread selecting([&] {
      const std::int32_t rows[] = {0, 0, 0, 0};
      is_running = true;
      try {
        for (;;) batch->select(rows, {});
      } catch (const ReleasedError&) {
      }
    });
    while (!is_running) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(200 + 10 * i));
    rig.cache->close();
    selecting.join();
    for (const auto& row : batch->rows()) {
      BOOST_CHECK_THROW(row->extend(Tokens(1), {}), ReleasedError);
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
