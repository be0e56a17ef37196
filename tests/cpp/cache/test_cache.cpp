// Sequences in slots: how many pages they take, who shares what, which slot is chosen, what is kept
// for later, and that the figures say so exactly.
#include <boost/test/unit_test.hpp>

#include "cache/rig.hpp"

namespace kvspan::test {
namespace {

std::uint64_t mapped_pages(const Rig& rig) {
  return rig.cache->figures().mapped.value / kTestPage.value;
}
std::uint64_t calls(const Rig& rig) {
  std::uint64_t n = 0;
  for (std::size_t i = 0; i < kCallNames.size(); ++i) {
    n += rig.backend->calls().of(static_cast<Call>(i)).calls;
  }
  return n;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cache)

// 51.2 tokens to a page: token 51 lies on two pages.
BOOST_AUTO_TEST_CASE(tokens_straddle_pages) {
  Rig rig({.layers_per_page = 1});
  const auto a = rig.cache->sequence(Tokens(0));
  std::int64_t length = 0;
  for (const auto& [n, pages] :
       {std::pair(51, 1), {52, 2}, {102, 2}, {103, 3}, {256, 5}, {257, 6}}) {
    a->extend(Tokens(n - length), {});
    length = n;
    BOOST_TEST(mapped_pages(rig) == 2u * static_cast<unsigned>(pages));  // two lanes
    rig.write(*a, 1, 0, length);
    BOOST_TEST(rig.holds(*a, 1, 0, length));
    BOOST_TEST(figures_add_up(rig));
  }
}

BOOST_AUTO_TEST_CASE(growing_within_a_page_calls_nobody) {
  Rig rig({.layers_per_page = 1});
  const auto a = rig.grown(1, 1);
  const std::uint64_t before = calls(rig);
  for (int i = 1; i < 51; ++i) a->extend(Tokens(1), {});
  BOOST_TEST(calls(rig) == before);
  a->extend(Tokens(1), {});
  BOOST_TEST(calls(rig) > before);
}

BOOST_AUTO_TEST_CASE(what_cannot_be_done_changes_nothing) {
  Rig rig({.n_pages = 8, .layers_per_page = 2});
  const auto a = rig.grown(1, 100);
  BOOST_CHECK_THROW(a->extend(Tokens(0), {}), InvalidArgument);
  BOOST_CHECK_THROW(a->extend(Tokens(-1), {}), InvalidArgument);
  BOOST_CHECK_THROW(a->extend(Tokens(901), {}), CapacityError);
  BOOST_CHECK_THROW(a->truncate(Tokens(101), {}), InvalidArgument);
  BOOST_CHECK_THROW(a->truncate(Tokens(-1), {}), InvalidArgument);
  BOOST_CHECK_THROW(a->drop_before(Tokens(1), {}), InvalidArgument);  // no window
  BOOST_CHECK_THROW(rig.cache->sequence(Tokens(-1)), InvalidArgument);
  try {
    a->extend(Tokens(900), {});
    BOOST_ERROR("8 pages hold 204 tokens, not 1,000");
  } catch (const OutOfMemory& e) {
    BOOST_TEST((e.requested() == kTestPage * 36));  // of 40, less the 4 it has
    BOOST_TEST((e.free() == kTestPage * 4));
    BOOST_TEST((e.reclaimable() == Bytes(0)));
  }
  BOOST_TEST((a->length() == Tokens(100)));
  BOOST_TEST(mapped_pages(rig) == 4u);
  BOOST_TEST(rig.holds(*a, 1, 0, 100));
  a->extend(Tokens(104), {});
  BOOST_TEST(figures_add_up(rig));
}

BOOST_AUTO_TEST_CASE(a_fork_shares_whole_pages_and_copies_the_tail) {
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    Rig rig({.largest_class = largest_class, .layers_per_page = 2});
    const auto a = rig.grown(1, 110);  // 4 whole pages and a part of the fifth
    const auto b = a->fork(1, {}, {}).front();
    BOOST_TEST((rig.cache->figures().shared == kTestPage * 4));
    BOOST_TEST((rig.store->counts().in_use == kTestPage * 6));
    BOOST_TEST(rig.holds(*b, 1, 0, 110));
    b->extend(Tokens(20), {});
    a->extend(Tokens(20), {});
    rig.write(*a, 7, 110, 130);
    rig.write(*b, 8, 110, 130);
    BOOST_TEST(rig.holds(*a, 7, 110, 130));
    BOOST_TEST(rig.holds(*b, 8, 110, 130));
    // Back into what is shared: whoever writes there gets pages of his own first.
    b->truncate(Tokens(30), {});
    b->extend(Tokens(30), {});
    rig.write(*b, 9, 30, 60);
    BOOST_TEST(rig.holds(*a, 1, 0, 110));
    BOOST_TEST(rig.holds(*b, 1, 0, 30));
    BOOST_TEST(figures_add_up(rig));
    a->release({});
    BOOST_TEST(rig.holds(*b, 1, 0, 30));
    BOOST_TEST(figures_add_up(rig));
  }
}

BOOST_AUTO_TEST_CASE(the_slot_whose_pages_fit_best_is_taken) {
  Rig rig({.keep = kGiB});
  std::vector<std::shared_ptr<Sequence>> all;
  for (const std::int64_t n : {60, 600, 300}) all.push_back(rig.grown(1, n));
  std::vector<SlotId> slots;
  for (const auto& s : all) slots.push_back(s->slot());
  for (const auto& s : all) s->release({});
  const std::uint64_t maps = rig.backend->calls().of(Call::map).calls;
  const auto middle = rig.cache->sequence(Tokens(250));  // the least that is enough
  const auto most = rig.cache->sequence(Tokens(900));    // none is enough: the most there is
  BOOST_TEST((middle->slot() == slots[2]));
  BOOST_TEST((most->slot() == slots[1]));
  middle->extend(Tokens(250), {});
  BOOST_TEST(rig.backend->calls().of(Call::map).calls == maps);  // taken over as it was
  BOOST_TEST(figures_add_up(rig));
}

// A slot that a prompt fills to the end would be mapped further at once.
BOOST_AUTO_TEST_CASE(while_memory_is_ample_a_slot_has_room_to_grow) {
  for (const bool is_ample : {true, false}) {
    Rig rig({.n_pages = 256, .keep = is_ample ? std::nullopt : std::optional(kGiB)});
    const auto tight = rig.grown(1, 512);  // 40 pages
    const auto roomy = rig.grown(2, 550);
    const SlotId slots[] = {tight->slot(), roomy->slot()};
    for (const auto& s : {tight, roomy}) s->release({});
    BOOST_TEST((rig.cache->sequence(Tokens(512))->slot() == slots[is_ample ? 1 : 0]));
    BOOST_TEST((rig.cache->sequence(Tokens(470))->slot() == slots[0]));
  }
}

BOOST_AUTO_TEST_CASE(no_more_is_kept_than_allowed) {
  for (const std::uint32_t n_pages : {0u, 4u, 9u}) {
    Rig rig({.layers_per_page = 1, .keep = kTestPage * n_pages});
    for (int round = 0; round < 2; ++round) {
      std::vector<std::shared_ptr<Sequence>> all;
      for (int i = 0; i < 3; ++i) all.push_back(rig.grown(i, 130));
      if (round == 0) {
        all.front()->truncate(Tokens(20), {});
        BOOST_TEST((rig.cache->figures().kept <= kTestPage * n_pages));
      }
      all.clear();
      BOOST_TEST((rig.cache->figures().kept <= kTestPage * n_pages));
    }
    BOOST_TEST(figures_add_up(rig));
  }
}

// By default, while half of the pool is unused, everything; then next to nothing here: two pages a
// lane.
BOOST_AUTO_TEST_CASE(by_default_what_is_kept_depends_on_what_is_left) {
  Rig rig({.layers_per_page = 1});
  rig.grown(1, 500)->release({});
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 20));
  const auto a = rig.grown(1, 200);
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 20));
  const auto b = rig.grown(2, 900);
  rig.grown(3, 50)->release({});
  BOOST_TEST((rig.cache->figures().kept <= kTestPage * 4));
  BOOST_TEST((rig.cache->figures().kept > Bytes(0)));
}

BOOST_AUTO_TEST_CASE(only_lanes_with_a_window_drop_pages) {
  Rig rig;
  CacheOptions options = rig.cache_options;
  options.layers[1].window = Tokens(20);
  rig.cache = Cache::make(rig.store, options);
  const auto a = rig.grown(1, 300);
  BOOST_CHECK_THROW(a->drop_before(Tokens(282), {}), InvalidArgument);  // the next attends to 281
  const std::uint64_t before = mapped_pages(rig);
  a->drop_before(Tokens(200), {});
  BOOST_TEST(mapped_pages(rig) == before - 3);  // 200 / 51.2
  BOOST_TEST((a->dropped() == Tokens(200)));
  std::size_t n_full = 0;
  for (const MappedPage& page : rig.cache->page_map()) n_full += page.lane == 0;
  BOOST_TEST(n_full == 6u);
  BOOST_TEST(rig.holds(*a, 1, 200, 300));
  BOOST_TEST(figures_add_up(rig));
  BOOST_CHECK_THROW(a->truncate(Tokens(199), {}), InvalidArgument);
  a->drop_before(Tokens(100), {});  // gone already
  const auto b = a->fork(1, {}, {}).front();
  BOOST_TEST((b->dropped() == Tokens(200)));
  BOOST_TEST(rig.holds(*b, 1, 200, 300));
  BOOST_TEST(figures_add_up(rig));
}

BOOST_AUTO_TEST_CASE(overread_is_mapped_ahead_and_counted) {
  Rig rig;
  CacheOptions options = rig.cache_options;
  options.overread = Tokens(64);
  rig.cache = Cache::make(rig.store, options);
  const auto a = rig.grown(1, 40);
  BOOST_TEST((rig.cache->figures().ahead > Bytes(0)));
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  BOOST_TEST(figures_add_up(rig));
  rig.cache->trim();  // a kernel may read it: it stays
  BOOST_TEST((rig.cache->figures().ahead > Bytes(0)));
}

BOOST_AUTO_TEST_CASE(trimming_leaves_what_live_tokens_need) {
  Rig rig({.layers_per_page = 1, .keep = kGiB});
  const auto a = rig.grown(1, 300);
  rig.grown(2, 200)->release({});
  a->truncate(Tokens(60), {});
  const Bytes kept = rig.cache->figures().kept;
  BOOST_TEST((rig.cache->trim() == kept));
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  BOOST_TEST(mapped_pages(rig) == 4u);
  BOOST_TEST(rig.holds(*a, 1, 0, 60));
  BOOST_TEST(rig.cache->page_map().size() == 4u);
}

BOOST_AUTO_TEST_CASE(after_close_the_api_raises_and_shown_memory_lives) {
  Rig rig;
  const auto a = rig.grown(1, 100);
  auto space = rig.cache->space();
  const auto* bytes =
      reinterpret_cast<const std::int32_t*>(space->span(a->slot(), 0).address_of(Pages(0)).value);
  rig.cache->close();
  rig.cache->close();  // twice is once
  BOOST_CHECK_THROW(a->extend(Tokens(1), {}), ReleasedError);
  BOOST_CHECK_THROW(a->slot(), ReleasedError);
  BOOST_CHECK_THROW(a->fork(1, {}, {}), ReleasedError);
  BOOST_CHECK_THROW(rig.cache->sequence(Tokens(0)), ReleasedError);
  BOOST_CHECK_THROW(rig.cache->trim(), ReleasedError);
  a->release({});
  BOOST_TEST(*bytes == 100'000);
  BOOST_TEST((rig.store->counts().in_use > Bytes(0)));
  space.reset();
  BOOST_TEST((rig.store->counts().in_use == Bytes(0)));
  BOOST_TEST(rig.backend->violations().empty());
}

BOOST_AUTO_TEST_CASE(the_limit_of_what_is_kept_is_the_caches) {
  Rig rig({.layers_per_page = 2, .keep = kTestPage * 4});
  std::vector<std::shared_ptr<Sequence>> sequences;
  for (std::int32_t i = 0; i < 3; ++i) sequences.push_back(rig.grown(i, 300));
  for (const auto& sequence : sequences) sequence->truncate(Tokens(10), {});
  const Bytes kept = rig.cache->figures().kept;
  BOOST_TEST((kept > Bytes(0)));
  BOOST_TEST((kept <= kTestPage * 4));
  for (std::int32_t i = 0; i < 3; ++i) {
    BOOST_TEST(rig.holds(*sequences[static_cast<std::size_t>(i)], i, 0, 10));
  }
}

BOOST_AUTO_TEST_CASE(sizes_that_wrap_are_refused) {
  Rig rig;
  CacheOptions huge = rig.cache_options;
  huge.layers.assign(1, {.planes = {{"k", DType::f32, 1 << 20, 1 << 20}}});
  huge.max_seq_len = Tokens((1 << 22) + 1);  // of 4 TiB each
  BOOST_CHECK_THROW(Cache::make(rig.store, huge), InvalidArgument);
}

BOOST_AUTO_TEST_CASE(pages_that_prompts_have_filled_are_kept_no_longer) {
  Rig rig({.n_pages = 128, .layers_per_page = 2, .max_seqs = 40, .keep = kTestPage * 32});
  const auto begin = [&] {
    std::vector<std::shared_ptr<Sequence>> sequences;
    for (std::int32_t i = 0; i < 32; ++i) {
      sequences.push_back(rig.cache->sequence(Tokens(20)));
      sequences.back()->extend(Tokens(20), {});
    }
    return sequences;
  };
  for (const auto& sequence : begin()) sequence->release({});
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 32));
  const auto live = begin();
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  rig.grown(99, 480)->release({});  // 19 pages: there is room for them among the 32
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 19));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
