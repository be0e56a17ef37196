// The set of free ids, and the pool of ids on top of it, single threaded but for the last case.
#include <bit>
#include <boost/test/unit_test.hpp>

#include "pool/bitmap_tree.hpp"
#include "pool/support.hpp"

using kvspan::BitmapTree;
using kvspan::IdBits;
using kvspan::IdPool;
using kvspan::kIdsPerWord;
using kvspan::PoolTestPeer;
using kvspan_test::FrameId;
using kvspan_test::SizeClass;

namespace {

constexpr std::uint32_t kAll = ~std::uint32_t{0};

void set_id(BitmapTree& tree, std::uint32_t id) {
  tree.set({id / kIdsPerWord, std::uint32_t{1} << (id % kIdsPerWord)});
}

IdPool::Given give(IdPool& pool, std::initializer_list<std::uint32_t> indices) {
  std::vector<FrameId> ids;
  for (const std::uint32_t index : indices) ids.emplace_back(SizeClass(0), index);
  return pool.give(ids, [](IdBits) { return 0u; });
}

// Claims until there is nothing left, by hints alone. Returns how often each id came.
std::vector<int> drain(BitmapTree& tree, std::uint32_t n_ids, std::uint32_t want) {
  std::vector<int> seen(n_ids);
  std::uint32_t word = tree.n_words() / 2;
  for (IdBits ids; (ids = tree.claim(word, want)).mask != 0; word = ids.word) {
    for (; ids.mask != 0; ids.mask &= ids.mask - 1) {
      ++seen.at(ids.word * kIdsPerWord + static_cast<std::uint32_t>(std::countr_zero(ids.mask)));
    }
  }
  return seen;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(bitmap_tree)

BOOST_AUTO_TEST_CASE(an_empty_set_yields_nothing) {
  BitmapTree tree(100'000);
  BOOST_TEST(tree.claim(0, 1).mask == 0u);
  BOOST_TEST(tree.claim(tree.n_words() - 1, 64).mask == 0u);
  BOOST_TEST(tree.scan(tree.n_words(), 64).mask == 0u);
}

// Sizes on both sides of a word, of a word of marks (2,048 ids) and of a region (131,072 ids).
BOOST_AUTO_TEST_CASE(every_id_comes_back_exactly_once) {
  for (const std::uint32_t n_ids : {1u, 31u, 32u, 33u, 2048u, 2049u, 131'072u, 131'073u}) {
    for (const std::uint32_t want : {1u, 16u, 32u, 1000u}) {
      BitmapTree tree(n_ids);
      for (std::uint32_t id = 0; id < n_ids; ++id) set_id(tree, id);
      const std::vector<int> seen = drain(tree, n_ids, want);
      BOOST_TEST(std::count(seen.begin(), seen.end(), 1) == n_ids, n_ids << " ids by " << want);
      BOOST_TEST(tree.scan(tree.n_words(), 64).mask == 0u);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_lone_id_is_found_from_everywhere) {
  constexpr std::uint32_t n_ids = 600'000;
  for (const std::uint32_t id : {0u, 31u, 2047u, 2048u, 131'071u, 131'072u, 599'999u}) {
    BitmapTree tree(n_ids);
    for (const std::uint32_t from :
         {0u, 1u, id / kIdsPerWord, 4095u, 4096u, 4097u, tree.n_words() - 1}) {
      set_id(tree, id);
      const IdBits found = tree.claim(from, 16);
      BOOST_TEST(found.word == id / kIdsPerWord);
      BOOST_TEST(found.mask == std::uint32_t{1} << (id % kIdsPerWord));
    }
  }
}

BOOST_AUTO_TEST_CASE(adding_an_id_twice_shows) {
  BitmapTree tree(128);
  BOOST_TEST(tree.set({1, 0b0110}).already == 0u);
  BOOST_TEST(tree.set({1, 0b1100}).already == 0b0100u);
  BOOST_TEST(tree.claim(0, 64).mask == 0b1110u);
}

BOOST_AUTO_TEST_CASE(adjacent_ids_are_preferred) {
  BitmapTree tree(kIdsPerWord * 20);
  for (std::uint32_t word = 0; word < 20; ++word) tree.set({word, 0x5555'5555u});
  tree.set({3, 0xffffu << 8});
  tree.set({5, kAll});
  // Sixteen in a row a few words on win over sixteen scattered ones here.
  IdBits ids = tree.claim(0, 16);
  BOOST_TEST(ids.word == 3u);
  BOOST_TEST(ids.mask == 0xffffu << 8);
  // For more than a word, whole words come first.
  ids = tree.claim(0, 200);
  BOOST_TEST(ids.word == 5u);
  BOOST_TEST(ids.mask == kAll);
}

BOOST_AUTO_TEST_CASE(without_one_run_the_fewest_runs_are_taken) {
  BitmapTree tree(64);
  tree.set({0, 0b0011'1111'0000'0111'0000'1111'0101u});
  BOOST_TEST(tree.claim(0, 10).mask == 0b0011'1111'0000'0000'0000'1111'0000u);
  BOOST_TEST(tree.claim(0, 10).mask == 0b0000'0000'0000'0111'0000'0000'0101u);
}

// Whatever the hints say wrongly, a claim neither errs nor hangs, and scan finds what is there.
BOOST_AUTO_TEST_CASE(hints_of_stalled_threads_do_no_harm) {
  BitmapTree tree(kIdsPerWord * 64 * 3);
  tree.set({70, 0b1011});
  PoolTestPeer::hide(tree, 70);
  BOOST_TEST(tree.claim(0, 3).mask == 0u);
  BOOST_TEST(tree.scan(70, 3).mask == 0u);
  BOOST_TEST(tree.scan(71, 3).mask == 0b1011u);

  for (std::uint32_t word = 0; word < tree.n_words(); ++word) PoolTestPeer::mark_stale(tree, word);
  BOOST_TEST(tree.claim(0, 1).mask == 0u);
  set_id(tree, kIdsPerWord * 190);
  IdBits found = tree.claim(0, 1);
  if (found.mask == 0) found = tree.scan(tree.n_words(), 1);
  BOOST_TEST(found.word == 190u);
}

BOOST_AUTO_TEST_CASE(a_taker_finds_ids_that_the_hints_hide) {
  IdPool pool(SizeClass(0), 10'000);
  std::vector<FrameId> frames(10'000);
  BOOST_TEST_REQUIRE(pool.take(frames));
  give(pool, {7u, 4100u, 9999u});
  for (const std::uint32_t word : {7u / kIdsPerWord, 4100u / kIdsPerWord, 9999u / kIdsPerWord}) {
    PoolTestPeer::hide(PoolTestPeer::tree(pool), word);
  }
  std::vector<FrameId> again(3);
  BOOST_TEST_REQUIRE(pool.take(again));
  std::sort(again.begin(), again.end());
  BOOST_TEST(again[0].index() == 7u);
  BOOST_TEST(again[1].index() == 4100u);
  BOOST_TEST(again[2].index() == 9999u);
}

BOOST_AUTO_TEST_CASE(an_id_given_back_twice_is_counted_once) {
  IdPool pool(SizeClass(0), 100);
  std::vector<FrameId> frames(100);
  BOOST_TEST_REQUIRE(pool.take(frames));
  const IdPool::Given given = give(pool, {5u, 5u, 70u, 5u, 100u});
  BOOST_TEST(given.freed == 2u);
  BOOST_TEST(given.refused == 3u);
  BOOST_TEST(pool.counts().free == 2u);
  BOOST_TEST(pool.counts().fresh == 0u);
}

// Two threads meet at each word, one taking its last id while the other adds one. When they are
// done, all that was added must be found by hints alone: none may stay hidden.
BOOST_AUTO_TEST_CASE(no_id_stays_hidden_when_threads_race) {
  constexpr std::uint32_t n_words = 64 * 64 + 64;
  constexpr int n_rounds = kvspan_test::kSanitized ? 2 : 20;
  for (int round = 0; round < n_rounds; ++round) {
    BitmapTree tree(n_words * kIdsPerWord);
    for (std::uint32_t word = 0; word < n_words; ++word) tree.set({word, 1});
    std::atomic<std::uint32_t> at[2] = {0, 0};
    std::atomic<std::uint32_t> n_claimed{0};
    kvspan_test::run_threads(2, [&](int me) {
      for (std::uint32_t word = 0; word < n_words; ++word) {
        at[me].store(word);
        for (int spins = 0; at[1 - me].load() < word; ++spins) {
          if (spins > 1000) std::this_thread::yield();
        }
        // The two are shifted against each other a little, by another amount each time.
        const std::uint32_t delay = me == 0 ? word % 13 : word % 17;
        for (std::atomic<std::uint32_t> i = 0; i.load() < delay;) i.fetch_add(1);
        if (me == 0) {
          n_claimed += static_cast<std::uint32_t>(std::popcount(tree.claim(word, 1).mask));
        } else {
          tree.set({word, 2});
        }
      }
      at[me].store(n_words);
    });
    const std::vector<int> left = drain(tree, n_words * kIdsPerWord, 32);
    const auto n_left = std::count(left.begin(), left.end(), 1);
    BOOST_TEST(n_left + n_claimed.load() == 2 * n_words);
  }
}

BOOST_AUTO_TEST_SUITE_END()
