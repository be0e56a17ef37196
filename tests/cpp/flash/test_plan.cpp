// How the decode kernel's work is divided.
#include <boost/test/unit_test.hpp>
#include <stdexcept>
#include <vector>

#include "flash/problem.hpp"
#include "kernel/plan.hpp"

namespace kvspan::flash {
namespace {

BOOST_AUTO_TEST_SUITE(plan)

BOOST_AUTO_TEST_CASE(every_tile_of_every_item_is_in_one_piece) {
  for (const int n_threads : {1, 2, 3, 7, 64}) {
    for (const std::vector<std::int32_t>& lengths :
         {std::vector<std::int32_t>{0, 1, 5000, 31, 0, 32, 33}, {100000}, {0}, {}}) {
      Decode decode(Element::float32, lengths, 100000);
      const Plan plan = make_plan(decode.problem, 8, n_threads);
      BOOST_TEST(plan.n_pieces() >= 1);
      BOOST_TEST(plan.n_pieces() <= n_threads);
      std::int64_t tiles = 0, tokens = 0;
      for (const Item& item : plan.items) {
        BOOST_TEST(item.first_tile == tiles);
        tiles = item.last_tile();
        tokens += (item.end - item.begin) * item.n_heads;
      }
      std::int64_t expected = 0;
      for (const std::int32_t length : lengths) expected += length * decode.problem.n_kv_heads;
      BOOST_TEST(tokens == expected);
      BOOST_TEST(plan.cuts.front() == 0);
      BOOST_TEST(plan.cuts.back() == tiles);
      const std::int64_t share = tiles / plan.n_pieces();
      for (int i = 0; i < plan.n_pieces(); ++i) {
        const auto at = static_cast<std::size_t>(i);
        const std::int64_t size = plan.cuts[at + 1] - plan.cuts[at];
        BOOST_TEST(size >= share);
        BOOST_TEST(size <= share + 1);
      }
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const Item& item = plan.items[static_cast<std::size_t>(plan.item_of(tile))];
        BOOST_TEST((item.first_tile <= tile && tile < item.last_tile()));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(what_is_cut_or_empty_is_left_for_joining) {
  Decode decode(Element::float32, {0, 64000, 64000}, 64000);
  const Plan plan = make_plan(decode.problem, 8, 3);
  BOOST_TEST(plan.n_pieces() == 3);
  BOOST_TEST(plan.unfinished == (std::vector<int>{0, 1, 2}), boost::test_tools::per_element());
  BOOST_TEST(make_plan(decode.problem, 8, 2).unfinished == std::vector<int>{0},
             boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_window_leaves_out_what_no_query_sees) {
  Decode decode(Element::float32, {1000}, 1000);
  decode.problem.window_left = 99;
  const Plan plan = make_plan(decode.problem, 8, 1);
  BOOST_TEST(plan.items.front().begin == 900);
  BOOST_TEST(plan.items.front().end == 1000);
}

BOOST_AUTO_TEST_CASE(heads_that_lie_apart_are_items_of_their_own) {
  Decode decode(Element::float32, {100}, 100);
  BOOST_TEST(make_plan(decode.problem, 8, 1).items.size() == 1u);
  decode.problem.keys.head_stride = 100 * decode.problem.keys.position_stride;
  BOOST_TEST(make_plan(decode.problem, 8, 1).items.size() == 2u);
}

BOOST_AUTO_TEST_CASE(lengths_and_slots_that_are_not_there_are_refused) {
  Decode decode(Element::float32, {100, 100}, 100);
  decode.lengths[1] = 101;
  BOOST_CHECK_THROW(make_plan(decode.problem, 8, 1), std::invalid_argument);
  decode.lengths[1] = 100;
  const std::int32_t slots[] = {0, 2};
  decode.problem.slots = slots;
  BOOST_CHECK_THROW(make_plan(decode.problem, 8, 1), std::invalid_argument);
  decode.lengths[1] = 0;  // nobody looks at its slot
  BOOST_CHECK_NO_THROW(make_plan(decode.problem, 8, 1));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace kvspan::flash
