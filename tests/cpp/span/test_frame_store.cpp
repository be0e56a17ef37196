// Frames with memory behind them: size classes under one budget, reclamation, and exact figures.
#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <memory>
#include <random>
#include <thread>

#include "backend/host_backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "span/frame_store.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {
namespace {

constexpr Bytes kPage = kKiB * 64;

struct Rig {
  explicit Rig(std::uint32_t n_pages, std::uint8_t largest_class = 0) {
    const Bytes capacity = kPage * n_pages;
    auto owned = std::make_unique<FaultyBackend>(
        make_host_backend({.page_size = kPage,
                           .capacity = capacity,
                           .largest_class = SizeClass(largest_class),
                           .huge_pages = false}));
    backend = owned.get();
    store = std::make_unique<FrameStore>(std::move(owned), capacity, SizeClass(largest_class));
    owner = store->new_owner();
  }

  std::vector<FrameId> take(std::uint32_t n_pages) {
    const FrameStore::Gap gap{Pages(n_pages), owner};
    std::vector<FrameStore::Taken> taken;
    store->take({&gap, 1}, taken);
    std::vector<FrameId> frames;
    for (const auto& t : taken) frames.push_back(t.frame);
    return frames;
  }

  FaultyBackend* backend;
  std::unique_ptr<FrameStore> store;
  OwnerTag owner;
};

std::vector<int> classes_of(const std::vector<FrameId>& frames) {
  std::vector<int> classes;
  for (const FrameId frame : frames) classes.push_back(frame.size_class().value);
  return classes;
}

// Holds frames that it gives back when asked.
class Hoarder final : public Reclaimer {
 public:
  Hoarder(FrameStore& store, std::vector<FrameId> frames)
      : store_(store), frames_(std::move(frames)) {
    store_.add(this);
  }
  ~Hoarder() { store_.remove(this); }

  Pages reclaim(Pages wanted, Reach) noexcept override {
    Pages given{};
    while (given < wanted && !frames_.empty()) {
      given += store_.give({&frames_.back(), 1});
      frames_.pop_back();
    }
    return given;
  }
  Pages reclaimable() const noexcept override {
    return Pages(static_cast<std::uint32_t>(frames_.size()));
  }

 private:
  FrameStore& store_;
  std::vector<FrameId> frames_;
};

}  // namespace

BOOST_AUTO_TEST_SUITE(frame_store)

BOOST_AUTO_TEST_CASE(a_known_length_is_covered_by_few_frames) {
  Rig rig(64, 3);
  const std::vector<int> expected = {3, 3, 2, 0};  // 8 + 8 + 4 + 1
  BOOST_TEST(classes_of(rig.take(21)) == expected, boost::test_tools::per_element());
  BOOST_TEST((rig.store->counts().in_use == kPage * 21));
}

BOOST_AUTO_TEST_CASE(what_large_frames_cannot_cover_small_ones_do) {
  Rig rig(12, 3);
  const auto first = rig.take(7);
  const std::vector<int> classes = classes_of(rig.take(5));
  BOOST_TEST(std::ranges::count(classes, 3) == 0);  // 8 pages are more than are left
  BOOST_TEST((rig.store->counts().created == kPage * 12));
}

BOOST_AUTO_TEST_CASE(frames_are_created_once_and_recycled) {
  Rig rig(32);
  auto frames = rig.take(16);
  const auto created = rig.backend->calls().of(Call::create);
  BOOST_TEST(created.handles == 16u);
  BOOST_TEST(created.calls == 1u);  // adjacent frames in one call
  rig.store->give(frames);
  frames = rig.take(16);
  BOOST_TEST(rig.backend->calls().of(Call::create).handles == 16u);
}

BOOST_AUTO_TEST_CASE(memory_in_large_frames_is_found_for_small_ones) {
  Rig rig(16, 3);
  const auto large = rig.take(16);
  BOOST_TEST(large.size() == 2u);
  rig.store->give(large);
  // All memory is in two free frames of 8 pages; one page is asked for.
  const auto small = rig.take(1);
  BOOST_TEST(small.front().size_class().value == 0);
  BOOST_TEST((rig.store->counts().created <= kPage * 16));
  BOOST_TEST(rig.backend->violations().empty());
}

BOOST_AUTO_TEST_CASE(out_of_memory_says_how_much) {
  Rig rig(16);
  const auto held = rig.take(10);
  const auto before = rig.store->counts();
  try {
    rig.take(7);
    BOOST_ERROR("16 pages are not enough for 17");
  } catch (const OutOfMemory& e) {
    BOOST_TEST((e.requested() == kPage * 7));
    BOOST_TEST((e.free() == kPage * 6));
    BOOST_TEST((e.reclaimable() == Bytes(0)));
  }
  BOOST_TEST((rig.store->counts().in_use == before.in_use));
  BOOST_TEST(rig.take(6).size() == 6u);  // exactly what was free
}

BOOST_AUTO_TEST_CASE(reclaimers_are_asked_before_giving_up) {
  Rig rig(16);
  Hoarder hoarder(*rig.store, rig.take(10));
  BOOST_TEST((rig.store->reclaimable() == kPage * 10));
  BOOST_TEST(rig.take(12).size() == 12u);
  BOOST_TEST((rig.store->reclaimable() == kPage * 4));  // and only for what was short
}

BOOST_AUTO_TEST_CASE(a_frame_that_changes_owner_is_dirty) {
  Rig rig(1);
  const FrameStore::Gap mine{Pages(1), rig.owner};
  const FrameStore::Gap other{Pages(1), rig.store->new_owner()};
  const auto is_dirty = [&](const FrameStore::Gap& gap) {
    std::vector<FrameStore::Taken> taken;
    rig.store->take({&gap, 1}, taken);
    rig.store->give({&taken.front().frame, 1});
    return taken.front().is_dirty;
  };
  BOOST_TEST(!is_dirty(mine));  // new: zeroed by its creation
  BOOST_TEST(!is_dirty(mine));  // its own bytes
  BOOST_TEST(is_dirty(other));
  BOOST_TEST(!is_dirty(other));
  // A take that fails leaves it as dirty as it was.
  const FrameStore::Gap too_much{Pages(2), rig.owner};
  std::vector<FrameStore::Taken> taken;
  BOOST_CHECK_THROW(rig.store->take({&too_much, 1}, taken), OutOfMemory);
  BOOST_TEST(is_dirty(mine));
  // Memory that was given back to the machine comes back clean.
  BOOST_TEST((rig.store->trim() == kPage));
  BOOST_TEST(!is_dirty(other));
}

BOOST_AUTO_TEST_CASE(new_frames_are_dirty_where_a_device_promises_nothing) {
  Rig rig(2);
  rig.backend->have_no_zeros();
  const FrameStore::Gap mine{Pages(1), rig.owner};
  std::vector<FrameStore::Taken> taken;
  for (int round = 0; round < 2; ++round) {
    taken.clear();
    rig.store->take({&mine, 1}, taken);
    BOOST_TEST(taken.front().is_dirty);
    rig.store->give_back(taken);
    BOOST_TEST((rig.store->trim() == kPage));
  }
}

BOOST_AUTO_TEST_CASE(creating_ahead_and_trimming) {
  Rig rig(16);
  rig.store->create_ahead(kPage * 10);
  BOOST_TEST((rig.store->counts().created == kPage * 10));
  BOOST_TEST((rig.store->counts().in_use == Bytes(0)));
  BOOST_CHECK_THROW(rig.store->create_ahead(kPage * 17), OutOfMemory);
  const auto held = rig.take(4);
  BOOST_TEST((rig.store->trim() == kPage * 6));
  BOOST_TEST((rig.store->counts().created == kPage * 4));
  BOOST_TEST(rig.take(12).size() == 12u);
  BOOST_TEST(rig.backend->violations().empty());
}

// Four threads that never want more than there is: a share each of 16 pages.
void take_shares(std::uint8_t largest_class) {
  Rig rig(64, largest_class);
  std::atomic<int> n_refused{0};
  std::vector<std::thread> threads;
  for (std::uint32_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 2000; ++i) {
        const std::uint32_t n = 1 + static_cast<std::uint32_t>(random() % 16);
        try {
          rig.store->give(rig.take(n));
        } catch (const OutOfMemory&) {
          ++n_refused;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  BOOST_TEST_MESSAGE("refused: " << n_refused.load());
  BOOST_TEST(n_refused.load() == 0);
  BOOST_TEST((rig.store->counts().in_use == Bytes(0)));
  BOOST_TEST((rig.store->counts().created <= rig.store->counts().capacity));
  BOOST_TEST(rig.backend->violations().empty());
}

BOOST_AUTO_TEST_CASE(concurrent_takers_each_get_their_share) { take_shares(0); }

BOOST_AUTO_TEST_CASE(concurrent_takers_of_several_classes) { take_shares(2); }

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
