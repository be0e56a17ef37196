// Pages are mapped before they are needed: decoding that the background keeps up with calls no
// driver, and nothing goes wrong when the two meet.
#include <algorithm>
#include <array>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <thread>
#include <vector>

#include "cache/rig.hpp"

namespace kvspan::test {

namespace {

std::uint64_t driver_work(const Rig& rig) {
  std::uint64_t sum = 0;
  for (const Call call : {Call::create, Call::map, Call::set_access, Call::unmap, Call::release}) {
    sum += rig.backend->calls().of(call).calls;
  }
  return sum;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(mapper)

BOOST_AUTO_TEST_CASE(a_step_finds_its_page_mapped) {
  for (const std::int32_t layers_per_page : {1, 2}) {
    Rig rig({.layers_per_page = layers_per_page});
    const auto a = rig.grown(1, 40);
    const auto b = rig.grown(2, 51);
    const auto batch = rig.cache->batch({a, b});
    std::uint64_t in_steps = 0;
    rig.store->background().turn();
    const std::uint64_t late = rig.cache->figures().n_grown_late;
    for (std::int64_t i = 0; i < 300; ++i) {
      const std::uint64_t before = driver_work(rig);
      batch->step(Tokens(1), {});
      in_steps += driver_work(rig) - before;
      rig.write(*a, 1, 40 + i, 41 + i);
      rig.write(*b, 2, 51 + i, 52 + i);
      rig.store->background().turn();
    }
    BOOST_TEST(in_steps == 0u);
    BOOST_TEST(rig.cache->figures().n_grown_late == late);
    BOOST_TEST(rig.holds(*a, 1, 0, 340));
    BOOST_TEST(rig.holds(*b, 2, 0, 351));
    BOOST_TEST(figures_add_up(rig));
    BOOST_TEST(rig.backend->violations().empty());
  }
}

BOOST_AUTO_TEST_CASE(a_piece_maps_for_one_sequence_or_for_all_that_have_no_room) {
  Rig rig({.layers_per_page = 2});
  const auto soon = rig.grown(1, 47), sooner = rig.grown(2, 48);
  const auto now = rig.grown(3, 51), now_as_well = rig.grown(4, 102);
  const auto has_room = [](const auto& sequence) {
    return sequence->state()->capacity - sequence->state()->length >= 8;
  };
  Background& background = rig.store->background();
  WorkDone done = background.piece();
  BOOST_TEST((done.n_frames == 2u && done.has_more));
  BOOST_TEST((has_room(now) && has_room(now_as_well) && !has_room(sooner)));
  done = background.piece();
  BOOST_TEST((done.n_frames == 1u && done.has_more));
  BOOST_TEST((has_room(sooner) && !has_room(soon)));
  BOOST_TEST(background.piece().n_frames == 1u);
  BOOST_TEST(has_room(soon));
  done = background.piece();
  BOOST_TEST((done.n_frames == 0u && !done.has_more && !done.is_idle));
}

BOOST_AUTO_TEST_CASE(what_is_mapped_ahead_is_counted_so_and_given_up_under_pressure) {
  Rig rig({.n_pages = 4, .layers_per_page = 2});
  const auto a = rig.grown(1, 48);
  rig.store->background().turn();
  BOOST_TEST((rig.cache->figures().ahead == kTestPage));
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  BOOST_TEST((rig.cache->reclaimable() == Pages(1)));
  const auto b = rig.grown(2, 50);  // needs the page that is free, and that one
  BOOST_TEST((rig.cache->figures().ahead == Bytes(0)));
  BOOST_TEST(rig.store->background().turn().n_frames == 0u);  // nothing is taken from anybody
  a->extend(Tokens(3), {});
  BOOST_TEST(rig.holds(*a, 1, 0, 48));
  BOOST_CHECK_THROW(a->extend(Tokens(1), {}), OutOfMemory);
}

// 25.6 tokens a page, and 2,048 announced tokens at first, which is 80 pages.
BOOST_AUTO_TEST_CASE(an_announced_prompt_finds_its_pages_mapped) {
  Rig rig({.n_pages = 200, .max_seq_len = 5000});
  const auto a = rig.cache->sequence(Tokens(4500));
  Background& background = rig.store->background();
  TimePoint now{};
  background.turn(now);
  BOOST_TEST((rig.cache->figures().mapped == kTestPage * 80));
  std::uint64_t in_calls = 0;
  for (const std::int64_t n : {1500, 1500, 1500}) {
    const std::uint64_t before = driver_work(rig);
    a->extend(Tokens(n), {});
    in_calls += driver_work(rig) - before;
    background.turn(now += std::chrono::milliseconds(1));
    background.turn(now += std::chrono::milliseconds(199));
  }
  BOOST_TEST(in_calls == 0u);
  BOOST_TEST(rig.cache->figures().n_grown_late == 0u);
  BOOST_TEST((rig.cache->figures().mapped <= kTestPage * (4500 * 10 / 256 + 2)));
  BOOST_TEST(figures_add_up(rig));
}

// What a piece of it leaves of a large frame is for the next one, whoever maps it.
BOOST_AUTO_TEST_CASE(pieces_of_an_announced_prompt_take_large_frames) {
  struct Prompt {
    std::int64_t announced;
    std::uint64_t n_pages, n_frames;
  };
  for (const auto& [announced, n_pages, n_frames] :
       {Prompt{0, 41, 4}, Prompt{1200, 47, 6}, Prompt{4500, 48, 3}}) {
    Rig rig({.n_pages = 200, .largest_class = 4, .keep = kTestPage, .max_seq_len = 5000});
    const auto a = rig.cache->sequence(Tokens(announced));
    a->extend(Tokens(1040), {});  // 40.6 pages
    BOOST_TEST((rig.cache->figures().mapped == kTestPage * n_pages));
    BOOST_TEST(rig.backend->calls().of(Call::map).handles == n_frames);
    BOOST_TEST(figures_add_up(rig));
  }
}

// What a released sequence's slot keeps is unmapped once its work is done, a few frames at a time.
BOOST_AUTO_TEST_CASE(the_background_unmaps_what_is_kept) {
  Rig rig({.n_pages = 100, .keep = Bytes(0), .max_seq_len = 5000});
  const auto unmapped = [&] { return rig.backend->calls().of(Call::unmap).handles; };
  auto a = rig.grown(1, 2000);  // 79 pages
  rig.backend->set_manual_fences(true);
  a.reset();
  Background& background = rig.store->background();
  WorkDone done = background.piece();
  BOOST_TEST((done.n_frames == 0u && !done.is_idle));
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 79));
  rig.backend->pass_all();
  done = background.piece();
  BOOST_TEST((done.n_frames == 1u && done.has_more));
  BOOST_TEST(unmapped() == 8u);
  background.turn();
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  BOOST_TEST(background.piece().is_idle);
  const MapperEvent last = rig.cache->mapper_events().back();
  BOOST_TEST((last.kind == MapperEvent::Kind::unmapped && last.pages == Pages(79 - 9 * 8)));
}

BOOST_AUTO_TEST_CASE(a_release_leaves_unmapping_to_the_background_that_runs) {
  Rig rig({.n_pages = 100, .keep = Bytes(0), .max_seq_len = 5000});
  rig.store->background().start();
  auto a = rig.grown(1, 2000);
  a.reset();
  while (rig.cache->figures().kept > Bytes(0)) std::this_thread::yield();
  const auto events = rig.cache->mapper_events();
  const auto n_unmapped =
      std::ranges::count(events, MapperEvent::Kind::unmapped, &MapperEvent::kind);
  BOOST_TEST(n_unmapped == 10);
}

BOOST_AUTO_TEST_CASE(without_memory_the_mapper_pauses_longer_each_time) {
  using namespace std::chrono_literals;
  Rig rig({.n_pages = 4, .layers_per_page = 2});
  const auto a = rig.grown(1, 48), b = rig.grown(2, 51);
  TimePoint now{};
  std::vector<TimePoint::duration> pauses;
  for (; now.time_since_epoch() < 300ms; now += 1ms) rig.store->background().turn(now);
  std::vector<TimePoint> starved;
  for (const MapperEvent& event : rig.cache->mapper_events()) {
    if (event.kind == MapperEvent::Kind::starved) starved.push_back(event.at);
  }
  for (std::size_t i = 1; i < starved.size(); ++i) pauses.push_back(starved[i] - starved[i - 1]);
  const TimePoint::duration expected[] = {1ms, 2ms, 4ms, 8ms, 16ms, 32ms, 64ms, 64ms, 64ms};
  BOOST_TEST(std::ranges::equal(pauses, expected));
  b->release({});
  rig.cache->trim();
  rig.store->background().turn(now + 64ms);
  BOOST_TEST((rig.cache->mapper_events().back().kind == MapperEvent::Kind::mapped));
}

BOOST_AUTO_TEST_CASE(empty_full_and_shared_sequences_are_left_alone) {
  Rig rig;
  const auto empty = rig.cache->sequence(Tokens(0));
  const auto full = rig.grown(1, 1000);
  const auto parent = rig.grown(2, 150);
  const auto child = parent->fork(1, {}, {}).front();
  child->truncate(Tokens(20), {});  // the next token would go into a shared page
  const std::uint64_t before = driver_work(rig);
  const std::int64_t room = parent->state()->capacity - parent->state()->length;
  BOOST_REQUIRE(room < 8);  // the parent alone is short of room
  rig.store->background().turn();
  BOOST_TEST(driver_work(rig) - before == (room < 8 ? 2u : 0u));  // a frame is created and mapped
  BOOST_TEST(rig.holds(*parent, 2, 0, 150));
  BOOST_TEST(figures_add_up(rig));
}

BOOST_AUTO_TEST_CASE(a_failure_is_left_to_the_call_that_needs_the_page) {
  Rig rig({.layers_per_page = 2});
  const auto a = rig.grown(1, 48);
  rig.backend->fail(1, Fault::driver, Call::map, FaultyBackend::kEver);
  BOOST_TEST(rig.store->background().turn().n_frames == 0u);
  a->extend(Tokens(3), {});
  BOOST_CHECK_THROW(a->extend(Tokens(1), {}), DriverError);
  rig.backend->fail_no_more();
  a->extend(Tokens(1), {});
  BOOST_TEST(rig.holds(*a, 1, 0, 48));
  BOOST_TEST(figures_add_up(rig));
}

// Long sequences grow by larger frames where there are any, so that fewer calls are needed.
BOOST_AUTO_TEST_CASE(long_sequences_take_longer_strides) {
  Rig rig({.n_pages = 1024, .largest_class = 3, .max_seq_len = 60'000});
  const auto a = rig.cache->sequence(Tokens(0));
  a->extend(Tokens(25 * 600), {});
  const auto before = rig.backend->calls().of(Call::map).handles;
  a->extend(Tokens(60), {});
  const auto figures = rig.cache->figures();
  BOOST_TEST(rig.backend->calls().of(Call::map).handles - before <= 2u);
  BOOST_TEST((figures.ahead >= kTestPage));
  BOOST_TEST((figures.ahead <= kTestPage * 8));
  BOOST_TEST(figures_add_up(rig));
}

// A short sequence counts for little where the others are long.
BOOST_AUTO_TEST_CASE(short_sequences_take_two_pages_among_long_ones) {
  for (const bool has_long : {false, true}) {
    Rig rig({.n_pages = 256, .largest_class = 1, .max_seq_len = 5000});
    const auto other = rig.grown(1, has_long ? 4000 : 40);
    const auto a = rig.grown(2, 20);
    rig.store->background().turn();
    a->extend(Tokens(100), {});  // 4.7 pages
    BOOST_TEST(a->state()->capacity == (has_long ? 153 : 128));
  }
}

// What a long stride leaves over costs nothing then, and the next sequence in the slot may need it.
BOOST_AUTO_TEST_CASE(strides_are_an_eighth_while_memory_is_ample) {
  const auto pages_ahead_of = [](std::uint32_t n_pages, std::optional<Bytes> keep) {
    Rig rig({.n_pages = n_pages, .largest_class = 4, .keep = keep, .max_seq_len = 5000});
    const auto a = rig.grown(1, 2046);  // two tokens less than 80 pages
    rig.store->background().turn();
    BOOST_TEST(figures_add_up(rig));
    return rig.cache->figures().ahead.value / kTestPage.value;
  };
  BOOST_TEST(pages_ahead_of(256, {}) == 8u);
  BOOST_TEST(pages_ahead_of(256, kTestPage) == 2u);
  BOOST_TEST(pages_ahead_of(100, {}) == 2u);
}

// Of what was announced, if that is more; and from where the pages end, so that each is one frame.
// Whether a prompt goes on that was not announced nobody knows.
BOOST_AUTO_TEST_CASE(strides_are_one_frame_each_while_memory_is_ample) {
  struct Grown {
    std::int64_t announced;
    std::array<std::int64_t, 2> n_tokens;
    std::array<std::uint64_t, 2> n_pages, n_frames;
  };
  for (const auto& [announced, n_tokens, n_pages, n_frames] :
       {Grown{4500, {1040, 600}, {48, 80}, {3, 2}}, Grown{2400, {1040, 600}, {48, 72}, {3, 2}},
        Grown{1120, {1120, 10}, {44, 48}, {4, 1}}, Grown{0, {1040, 600}, {41, 65}, {4, 2}}}) {
    Rig rig({.n_pages = 256, .largest_class = 4, .max_seq_len = 5000});
    const auto a = rig.cache->sequence(Tokens(announced));
    for (const std::size_t i : {0u, 1u}) {  // 40.6 pages and 64.1, or 43.8 and 44.1
      const std::uint64_t before = rig.backend->calls().of(Call::map).handles;
      a->extend(Tokens(n_tokens[i]), {});
      BOOST_TEST((rig.cache->figures().mapped == kTestPage * n_pages[i]));
      BOOST_TEST(rig.backend->calls().of(Call::map).handles - before == n_frames[i]);
    }
    BOOST_TEST(figures_add_up(rig));
  }
}

// A fork copies the frame that it goes on in, so those of sequences that were forked are small.
BOOST_AUTO_TEST_CASE(branches_take_no_long_strides) {
  const auto room_of = [](const std::shared_ptr<Sequence>& a) {
    a->extend(Tokens(10), {});  // to 41.0 pages
    return a->state()->capacity - 1050;
  };
  const auto with_rows = [&](auto branch) {
    Rig rig({.n_pages = 512, .largest_class = 4, .max_seqs = 4, .max_seq_len = 5000});
    const auto batch = rig.cache->adjacent_batch(2);
    const auto rows = batch->rows();
    for (const auto& row : rows) row->extend(Tokens(1040), {});
    const auto grown = branch(*rig.cache, *batch, rows);
    std::vector<int> rooms;
    for (const auto& sequence : grown) rooms.push_back(room_of(sequence));
    BOOST_TEST(figures_add_up(rig));
    return rooms;
  };
  using Rows = std::vector<std::shared_ptr<Sequence>>;
  const std::vector<int> none = with_rows([](Cache&, Batch&, const Rows& rows) { return rows; });
  const std::vector<int> forked = with_rows([](Cache&, Batch&, const Rows& rows) {
    return Rows{rows[0], rows[0]->fork(1, {}, {}).front(), rows[1]};
  });
  const std::vector<int> reordered = with_rows([](Cache& cache, Batch&, const Rows& rows) {
    cache.reorder(rows, std::array{0, 0});
    return rows;
  });
  const std::vector<int> selected = with_rows([](Cache&, Batch& batch, const Rows&) {
    batch.select(std::array{1, 1}, {});
    return batch.rows();
  });
  const std::vector<int> twins = with_rows([](Cache&, Batch& batch, const Rows& rows) {
    const auto child = batch.fork({});
    return Rows{rows[0], child->rows()[0]};
  });
  const int is_short = 42 * 256 / 10 - 1050, is_long = 45 * 256 / 10 - 1050;
  BOOST_TEST((none == std::vector{is_long, is_long}));
  BOOST_TEST((forked == std::vector{is_short, is_short, is_long}));
  BOOST_TEST((reordered == std::vector{is_short, is_short}));
  BOOST_TEST((selected == std::vector{is_short, is_short}));
  BOOST_TEST((twins == std::vector{is_short, is_short}));
}

// Of a prompt whose beginning the prefix index knows, the rest is to come.
BOOST_AUTO_TEST_CASE(what_a_prefix_leaves_of_a_prompt_is_announced) {
  Rig rig({.n_pages = 200, .max_seq_len = 5000});
  const std::vector<std::int32_t> prompt = token_ids(1, 2000);
  rig.grown(1, 500)->publish(std::span(prompt).first(500), false, {});
  for (const std::int64_t expected : {0, 3000}) {
    const auto a = rig.cache->sequence(prompt, "", Tokens(expected));
    BOOST_TEST(a->length().value > 400);
    rig.store->background().turn();
    BOOST_TEST(a->state()->capacity >= (expected == 0 ? 2000 : 2400));
    BOOST_TEST(rig.holds(*a, 1, 0, a->length().value));
  }
}

// A call that comes too late takes a whole stride from what free slots keep: if it took a page, the
// next one would come too late as well.
BOOST_AUTO_TEST_CASE(a_late_call_takes_a_stride_of_what_is_kept) {
  Rig rig({.n_pages = 100, .largest_class = 1, .keep = kTestPage * 40, .max_seq_len = 5000});
  const auto a = rig.grown(1, 1536);  // 60 pages
  rig.grown(2, 1024)->release({});    // 40 pages
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 40));
  a->extend(Tokens(1), {});
  BOOST_TEST(a->state()->capacity == 62 * 256 / 10);
  BOOST_TEST((rig.cache->figures().kept == kTestPage * 38));
  BOOST_TEST(rig.holds(*a, 1, 0, 1536));
  BOOST_TEST(figures_add_up(rig));
}

// It takes its time to map for all that come to the end of their pages at once.
BOOST_AUTO_TEST_CASE(the_more_frames_are_needed_soon_the_earlier_the_mapper_begins) {
  using std::chrono::milliseconds;
  for (const std::size_t n : {1u, 100u}) {
    Rig rig({.n_pages = 512, .max_seqs = 128});
    std::vector<std::shared_ptr<Sequence>> rows;
    for (std::size_t i = 0; i < n; ++i) rows.push_back(rig.grown(1, 1));
    const auto batch = rig.cache->batch(rows);
    Background& background = rig.store->background();
    TimePoint now{};
    for (int length = 1; length < 25; ++length) {  // which is a page
      batch->step(Tokens(1), {});
      background.turn(now += milliseconds(100));
    }
    BOOST_TEST(rows[0]->state()->capacity == 25);
    background.turn(now + milliseconds(60));
    BOOST_TEST(rows[0]->state()->capacity == (n == 1 ? 25 : 51));
    background.turn(now + milliseconds(68));
    BOOST_TEST(rows[0]->state()->capacity == 51);
  }
}

// Load: a thread that decodes, forks, truncates and releases while the background maps ahead.
BOOST_AUTO_TEST_CASE(the_background_meets_every_other_call) {
  Rig rig({.n_pages = 96, .layers_per_page = 1, .max_seqs = 6});
  rig.store->background().start();
  for (int round = 0; round < 40; ++round) {
    auto a = rig.grown(1, 20 + round);
    auto b = rig.grown(2, 45);
    const auto batch = rig.cache->batch({a, b});
    for (std::int64_t i = 0; i < 60; ++i) {
      const std::int64_t at = a->length().value, bt = b->length().value;
      batch->step(Tokens(1), {});
      rig.write(*a, 1, at, at + 1);
      rig.write(*b, 2, bt, bt + 1);
      if (i % 20 == 10) {
        const auto c = a->fork(1, {}, {}).front();
        BOOST_TEST(rig.holds(*c, 1, 0, at + 1));
        b->truncate(Tokens(bt / 2), {});
      }
      if (i % 16 == 3) rig.cache->trim();
      if (i % 8 == 0) std::this_thread::yield();
    }
    BOOST_TEST(rig.holds(*a, 1, 0, a->length().value));
    BOOST_TEST(rig.holds(*b, 2, 0, b->length().value));
    a->release({});
  }
  rig.store->background().stop();
  BOOST_TEST(figures_add_up(rig));
  BOOST_TEST(rig.backend->violations().empty());
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
