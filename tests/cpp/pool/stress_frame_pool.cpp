// The frame pool under threads. The load is that of several serving threads whose requests take and
// give batches of frames, in pools from nearly empty to constantly exhausted, plus the misuse that
// counts have to survive. Seeded; the interleaving is the machine's. Run it under ThreadSanitizer:
// the owner table is deliberately not atomic, so a frame with two owners at once is a data race,
// and so is a missing order between the owner who gave a frame and the one who takes it next.
#include <boost/test/unit_test.hpp>
#include <chrono>

#include "pool/support.hpp"

using namespace kvspan_test;

namespace {

constexpr SizeClass kSingle{0};
constexpr int kThreads = 4;
// Magazines are filled and recalled all the time, however full the pool is.
constexpr std::uint32_t kLendFrom = 1;
using Clock = std::chrono::steady_clock;

struct Failures {
  std::atomic<std::uint64_t> owned_twice{0}, lost{0}, refused{0};
};

// One thread's share of the load, until `deadline` or `n_steps`. Ends with nothing held.
void churn(FramePool& pool, std::vector<int>& owners, int me, int n_steps,
           Clock::time_point deadline, Failures& failures) {
  Random random(static_cast<std::uint64_t>(me) * 7919 + owners.size());
  std::vector<std::vector<FrameId>> held;
  const std::size_t largest_batch = std::clamp<std::size_t>(owners.size() / 8, 1, 512);
  const auto give = [&](const std::vector<FrameId>& frames) {
    for (const FrameId frame : frames) {
      failures.lost += owners[frame.index()] != me;
      owners[frame.index()] = 0;
    }
    failures.refused += pool.give(frames).refused;
  };
  for (int step = 0; step < n_steps; ++step) {
    if (step % 256 == 0 && Clock::now() > deadline) break;
    if (held.empty() || random.below(2) == 0) {
      const std::size_t most = random.below(4) != 0 ? 16 : largest_batch;
      std::vector<FrameId> frames = take(pool, kSingle, random.below(most) + 1);
      if (frames.empty()) continue;
      for (const FrameId frame : frames) {
        failures.owned_twice += owners[frame.index()] != 0;
        owners[frame.index()] = me;
      }
      held.push_back(std::move(frames));
    } else {
      std::swap(held[random.below(held.size())], held.back());
      give(held.back());
      held.pop_back();
    }
  }
  for (const std::vector<FrameId>& frames : held) give(frames);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(stress_frame_pool)

BOOST_AUTO_TEST_CASE(no_frame_has_two_owners) {
  for (const std::uint32_t capacity : {1u, 64u, 1000u, 70'000u}) {
    FramePool pool(Pages(capacity), kSingle, kLendFrom);
    std::vector<int> owners(capacity);
    Failures failures;
    const auto deadline = Clock::now() + std::chrono::milliseconds(400);
    run_threads(kThreads, [&](int i) {
      churn(pool, owners, i + 1, kSanitized ? 5'000 : 100'000, deadline, failures);
    });
    BOOST_TEST(failures.owned_twice == 0u);
    BOOST_TEST(failures.lost == 0u);
    BOOST_TEST(failures.refused == 0u);

    const FramePool::Counts now = pool.counts(kSingle);
    BOOST_TEST(now.in_use == 0u);
    BOOST_TEST(now.fresh + now.free == capacity);
    const std::vector<FrameId> all = take(pool, kSingle, capacity);
    BOOST_TEST(all.size() == capacity);
    BOOST_TEST(all_distinct(all));
    BOOST_TEST(take(pool, kSingle, 1).empty());
  }
}

// All threads give the same frames, in different orders and batches. Each frame goes once.
BOOST_AUTO_TEST_CASE(racing_double_gives_free_a_frame_once) {
  constexpr std::uint32_t capacity = 5000;
  FramePool pool(Pages(capacity), kSingle, kLendFrom);
  for (int round = 0; round < (kSanitized ? 3 : 20); ++round) {
    const std::vector<FrameId> frames = take(pool, kSingle, capacity);
    std::atomic<std::uint32_t> n_freed{0}, n_refused{0};
    run_threads(kThreads, [&](int i) {
      std::size_t batch = i % 2 == 0 ? 1 : 7;
      for (std::size_t at = 0; at < frames.size(); at += batch) {
        const std::size_t n = std::min(batch, frames.size() - at);
        const FramePool::Given given = pool.give(std::span(frames).subspan(at, n));
        n_freed += given.freed;
        n_refused += given.refused;
      }
    });
    BOOST_TEST(n_freed == capacity);
    BOOST_TEST(n_refused == (kThreads - 1) * capacity);
    BOOST_TEST(pool.counts(kSingle).free == capacity);
  }
}

BOOST_AUTO_TEST_CASE(threads_share_and_give_the_same_frames) {
  FramePool pool(Pages(100), kSingle, kLendFrom);
  const std::vector<FrameId> frames = take(pool, kSingle, 70);
  std::atomic<std::uint32_t> n_wrong{0};
  run_threads(kThreads, [&](int) {
    for (int step = 0; step < (kSanitized ? 200 : 3000); ++step) {
      n_wrong += pool.share(frames);
      n_wrong += pool.references(frames[static_cast<std::size_t>(step) % 70]) < 2;
      const FramePool::Given given = pool.give(frames);
      n_wrong += given.freed + given.refused;
    }
  });
  BOOST_TEST(n_wrong == 0u);
  for (const FrameId frame : frames) BOOST_TEST(pool.references(frame) == 1u);
  BOOST_TEST(pool.counts(kSingle).in_use == 70u);
  BOOST_TEST(pool.give(frames).freed == 70u);
}

// One thread gives the last reference while others try to share: a frame either lives on with those
// who shared it or is gone for all of them, and is freed once in any case.
BOOST_AUTO_TEST_CASE(sharing_races_with_the_last_give) {
  constexpr std::uint32_t capacity = 3000;
  FramePool pool(Pages(capacity), kSingle, kLendFrom);
  std::vector<int> contents(capacity);
  for (int round = 1; round <= (kSanitized ? 3 : 20); ++round) {
    const std::vector<FrameId> frames = take(pool, kSingle, capacity);
    for (const FrameId frame : frames) contents[frame.index()] = round;
    std::atomic<std::uint32_t> n_freed{0}, n_refused{0}, n_wrong{0};
    run_threads(kThreads, [&](int i) {
      for (const FrameId& frame : frames) {
        if (i != 0 && pool.share({&frame, 1}) != 0) continue;
        n_wrong += contents[frame.index()] != round;
        const FramePool::Given given = pool.give({&frame, 1});
        n_freed += given.freed;
        n_refused += given.refused;
      }
    });
    BOOST_TEST(n_freed == capacity);
    BOOST_TEST(n_refused == 0u);
    BOOST_TEST(n_wrong == 0u);
    BOOST_TEST(pool.counts(kSingle).free == capacity);
  }
}

// Two threads hold each frame and read it. One gives it back first; the other waits for that by
// looking at the count, which orders nothing, frees the frame, takes it again (there is no other)
// and writes. That write comes after both reads: ThreadSanitizer sees it when it does not.
BOOST_AUTO_TEST_CASE(a_frame_is_taken_again_after_all_who_read_it) {
  constexpr std::uint32_t capacity = 1000;
  FramePool pool(Pages(capacity), kSingle, kLendFrom);
  std::vector<int> contents(capacity, 1);
  const std::vector<FrameId> frames = take(pool, kSingle, capacity);
  BOOST_TEST(pool.share(frames) == 0u);
  std::atomic<std::uint32_t> n_wrong{0};
  run_threads(2, [&](int me) {
    for (const FrameId& frame : frames) {
      if (me == 1) {
        while (pool.references(frame) != 1) std::this_thread::yield();
      }
      n_wrong.fetch_add(contents[frame.index()] != 1, std::memory_order_relaxed);
      const FramePool::Given given = pool.give({&frame, 1});
      n_wrong.fetch_add(given.freed != static_cast<std::uint32_t>(me), std::memory_order_relaxed);
      if (me == 1) {
        FrameId again;
        const bool taken = pool.take(kSingle, {&again, 1});
        n_wrong.fetch_add(!taken || again != frame, std::memory_order_relaxed);
        contents[frame.index()] = 2;
      }
    }
  });
  BOOST_TEST(n_wrong == 0u);
  BOOST_TEST(pool.give(frames).freed == capacity);
}

// A take fails only when the frames are really short: threads that together hold at most what there
// is never see a refusal, however the moment catches the others.
BOOST_AUTO_TEST_CASE(a_take_within_the_capacity_never_fails) {
  constexpr std::size_t share_of_each = 50;
  FramePool pool(Pages(kThreads * share_of_each), kSingle, kLendFrom);
  std::atomic<std::uint32_t> n_failed{0};
  run_threads(kThreads, [&](int i) {
    Random random(static_cast<std::uint64_t>(i) + 100);
    for (int step = 0; step < (kSanitized ? 2'000 : 30'000); ++step) {
      const std::vector<FrameId> frames = take(pool, kSingle, random.below(share_of_each) + 1);
      n_failed += frames.empty();
      pool.give(frames);
    }
  });
  BOOST_TEST(n_failed == 0u);
}

BOOST_AUTO_TEST_SUITE_END()
