// The lists of slots, held against a plain table of who is free with how many pages.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <map>
#include <random>
#include <vector>

#include "cache/slot_lists.hpp"

namespace kvspan {
namespace {

BOOST_AUTO_TEST_SUITE(slot_lists)

std::vector<std::int32_t> visited(const SlotLists& lists, Pages from, bool is_up) {
  std::vector<std::int32_t> slots;
  const auto add = [&](SlotId slot) {
    slots.push_back(slot.value);
    return false;
  };
  is_up ? lists.ascending(from, add) : lists.descending(from, add);
  return slots;
}

BOOST_AUTO_TEST_CASE(slots_come_in_the_order_of_their_pages_and_then_of_their_coming) {
  SlotLists lists(8);
  lists.put_free(SlotId(5), Pages(3));
  lists.put_free(SlotId(1), Pages(0));
  lists.put_free(SlotId(2), Pages(3));
  lists.put_free(SlotId(0), Pages(1000));
  lists.put_surplus(SlotId(7));
  BOOST_TEST(visited(lists, Pages(0), true) == (std::vector{1, 5, 2, 0}));
  BOOST_TEST(visited(lists, Pages(4), true) == (std::vector{0}));
  BOOST_TEST(visited(lists, Pages(UINT32_MAX), false) == (std::vector{0, 5, 2, 1}));
  BOOST_TEST(visited(lists, Pages(2), false) == (std::vector{1}));
  BOOST_TEST(lists.first_surplus()->value == 7);
  lists.remove(SlotId(7));
  lists.remove(SlotId(5));
  BOOST_TEST(!lists.first_surplus().has_value());
  BOOST_TEST(visited(lists, Pages(0), true) == (std::vector{1, 2, 0}));
}

BOOST_AUTO_TEST_CASE(every_free_slot_is_found_where_it_belongs) {
  constexpr std::int32_t kSlots = 200;
  std::mt19937 random(1);
  const auto upto = [&](std::uint32_t n) { return static_cast<std::uint32_t>(random() % (n + 1)); };
  SlotLists lists(kSlots);
  std::map<std::int32_t, std::uint32_t> free;  // slot -> pages
  for (int i = 0; i < 20'000; ++i) {
    const auto slot = static_cast<std::int32_t>(upto(kSlots - 1));
    switch (upto(3)) {
      case 0:
        lists.remove(SlotId(slot));
        free.erase(slot);
        break;
      case 1:
        lists.put_surplus(SlotId(slot));
        free.erase(slot);
        break;
      default:
        // All magnitudes, the largest included.
        free[slot] = static_cast<std::uint32_t>(std::uint64_t{UINT32_MAX} >> upto(32));
        free[slot] -= upto(std::min(free[slot], 40u));
        lists.put_free(SlotId(slot), Pages(free[slot]));
    }
    if (i % 50 != 0) continue;
    const std::uint32_t from = UINT32_MAX >> upto(31);
    const auto up = visited(lists, Pages(from), true);
    const auto down = visited(lists, Pages(from), false);
    for (const auto& [id, pages] : free) {
      if (pages >= from) BOOST_TEST(std::ranges::count(up, id) == 1);
      if (pages <= from) BOOST_TEST(std::ranges::count(down, id) == 1);
    }
    const auto is_close = [](std::uint32_t few, std::uint32_t many) {
      return few <= many || few - many <= many / 16;
    };
    for (std::size_t k = 0; k < up.size(); ++k) {
      BOOST_TEST(is_close(from, free.at(up[k])));
      if (k > 0) BOOST_TEST(is_close(free.at(up[k - 1]), free.at(up[k])));
    }
    for (std::size_t k = 0; k < down.size(); ++k) {
      BOOST_TEST(is_close(free.at(down[k]), from));
      if (k > 0) BOOST_TEST(is_close(free.at(down[k]), free.at(down[k - 1])));
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace kvspan
