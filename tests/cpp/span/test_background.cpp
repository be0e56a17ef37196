// The pool's background: frames are ready before they are asked for, within the budget, and its
// thread comes and goes cleanly.
#include <boost/test/unit_test.hpp>
#include <thread>

#include "backend/host_backend.hpp"
#include "core/errors.hpp"
#include "span/frame_store.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kKiB * 64;

struct Fixture {
  Fixture(std::uint32_t n_pages, std::uint8_t largest, Bytes ready) {
    auto owned =
        std::make_unique<FaultyBackend>(make_host_backend({.page_size = kPage,
                                                           .capacity = kPage * n_pages,
                                                           .largest_class = SizeClass(largest),
                                                           .huge_pages = false}));
    backend = owned.get();
    store =
        std::make_unique<FrameStore>(std::move(owned), kPage * n_pages, SizeClass(largest), ready);
  }
  Bytes free() const { return store->counts().created - store->counts().in_use; }
  std::vector<FrameStore::Taken> take(std::uint32_t pages) {
    std::vector<FrameStore::Taken> taken;
    const FrameStore::Gap gap{Pages(pages), store->new_owner()};
    store->take({&gap, 1}, taken);
    return taken;
  }

  FaultyBackend* backend;
  std::unique_ptr<FrameStore> store;
};

struct CountingWorker final : Worker {
  WorkDone work_ahead(TimePoint) noexcept override {
    n_turns.fetch_add(1);
    return {.n_frames = 0, .is_idle = is_idle.load()};
  }
  std::atomic<int> n_turns{0};
  std::atomic<bool> is_idle{false};
};

template <class F>
bool comes_true(F f) {
  for (int i = 0; i < 10'000; ++i) {
    if (f()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(background)

BOOST_AUTO_TEST_CASE(frames_are_ready_and_made_good) {
  Fixture f(256, 0, kPage * 10);
  BOOST_TEST(f.store->background().turn().n_frames == 10u);
  BOOST_TEST(f.free().value == (kPage * 10).value);
  const auto created = f.backend->calls().of(Call::create).calls;
  const auto taken = f.take(7);
  BOOST_TEST(f.backend->calls().of(Call::create).calls == created);  // they were ready
  BOOST_TEST(f.store->background().turn().n_frames == 7u);
  BOOST_TEST(f.store->background().turn().n_frames == 0u);
  f.store->give_back(taken);
}

BOOST_AUTO_TEST_CASE(frames_are_made_one_at_a_time) {
  Fixture f(256, 0, kPage * 2);
  for (const std::uint32_t created : {1u, 2u, 2u}) {
    const WorkDone done = f.store->background().piece();
    BOOST_TEST(done.has_more == (done.n_frames == 1u));
    BOOST_TEST(f.free().value == (kPage * created).value);
  }
}

BOOST_AUTO_TEST_CASE(every_size_class_has_some) {
  Fixture f(256, 2, kPage * 256);
  f.store->background().turn();
  // 64 single pages, two frames of two pages and two of four.
  BOOST_TEST(f.free().value == (kPage * (64 + 4 + 8)).value);
}

BOOST_AUTO_TEST_CASE(the_budget_is_kept) {
  Fixture f(8, 0, kPage * 6);
  const auto taken = f.take(5);
  BOOST_TEST(f.store->background().turn().n_frames == 3u);
  BOOST_TEST((f.store->counts().created == f.store->counts().capacity));
  BOOST_TEST(f.store->background().turn().n_frames == 0u);
  f.store->give_back(taken);
}

BOOST_AUTO_TEST_CASE(a_driver_that_fails_is_left_alone) {
  Fixture f(16, 0, kPage * 4);
  f.backend->fail(1, Fault::out_of_memory, Call::create);
  BOOST_TEST(f.store->background().turn().n_frames == 0u);
  BOOST_TEST((f.store->counts().in_use == Bytes(0)));
  BOOST_TEST(f.store->background().turn().n_frames == 4u);
}

BOOST_AUTO_TEST_CASE(the_thread_works_until_it_is_stopped) {
  Fixture f(64, 0, kPage * 4);
  CountingWorker worker;
  f.store->background().add(&worker);
  f.store->background().start();
  f.store->background().start();  // harmless
  BOOST_TEST(comes_true([&] { return worker.n_turns > 3 && f.free() == kPage * 4; }));
  f.store->background().stop();
  const int turns = worker.n_turns;
  f.store->background().wake();
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  BOOST_TEST(worker.n_turns == turns);
  f.store->background().start();
  BOOST_TEST(comes_true([&] { return worker.n_turns > turns; }));
  f.store->background().remove(&worker);
}

BOOST_AUTO_TEST_CASE(an_idle_thread_sleeps_until_it_is_woken) {
  Fixture f(64, 0, Bytes(0));
  CountingWorker worker;
  worker.is_idle = true;
  f.store->background().add(&worker);
  f.store->background().start();
  BOOST_TEST(comes_true([&] { return worker.n_turns == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  BOOST_TEST(worker.n_turns == 1);
  f.store->background().wake();
  BOOST_TEST(comes_true([&] { return worker.n_turns == 2; }));
  f.store->background().remove(&worker);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
