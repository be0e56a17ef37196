// The page table by itself: frames of several size classes in it, and ranges that cut through them.
#include <boost/test/unit_test.hpp>
#include <vector>

#include "core/sizes.hpp"
#include "span/span.hpp"

namespace kvspan::test {
namespace {

constexpr Bytes kPage = kKiB * 64;

// The entries of one frame of class `c`.
std::vector<PageEntry> frame(std::uint8_t c, std::uint32_t index) {
  std::vector<PageEntry> entries;
  for (Pages offset{}; offset < pages_of(SizeClass(c)); ++offset) {
    entries.push_back({FrameId(SizeClass(c), index), offset});
  }
  return entries;
}

// Pages 0-3: a frame of class 2; 4: none; 5-6: one of class 1; 7: one of class 0.
Span mixed() {
  Span span(Address(0x100000), Pages(16), kPage);
  span.set(Pages(0), frame(2, 0));
  span.set(Pages(5), frame(1, 3));
  span.set(Pages(7), frame(0, 9));
  return span;
}

bool same(PageRange a, std::uint32_t first, std::uint32_t last) {
  return a.first == Pages(first) && a.last == Pages(last);
}
PageRange range(std::uint32_t first, std::uint32_t last) { return {Pages(first), Pages(last)}; }

}  // namespace

BOOST_AUTO_TEST_SUITE(span)

BOOST_AUTO_TEST_CASE(a_new_span_is_unbacked_everywhere) {
  const Span span(Address(0x100000), Pages(16), kPage);
  BOOST_TEST((span.end() == Pages(0)));
  BOOST_TEST((span.backed_pages() == Pages(0)));
  BOOST_TEST(!span[Pages(0)].is_backed());
  BOOST_TEST(!span[Pages(15)].is_backed());
  BOOST_TEST((span.address_of(Pages(3)) == Address(0x130000)));
}

BOOST_AUTO_TEST_CASE(pages_know_their_frames) {
  const Span span = mixed();
  BOOST_TEST((span.end() == Pages(8)));
  BOOST_TEST((span.backed_pages() == Pages(7)));
  BOOST_TEST(same(span.frame_of(Pages(0)), 0, 4));
  BOOST_TEST(same(span.frame_of(Pages(3)), 0, 4));
  BOOST_TEST(same(span.frame_of(Pages(6)), 5, 7));
  BOOST_TEST(same(span.frame_of(Pages(7)), 7, 8));
  BOOST_TEST(!span[Pages(4)].is_backed());
}

BOOST_AUTO_TEST_CASE(ranges_grow_to_whole_frames) {
  const Span span = mixed();
  BOOST_TEST(same(span.widened(range(1, 2)), 0, 4));
  BOOST_TEST(same(span.widened(range(3, 6)), 0, 7));
  BOOST_TEST(same(span.widened(range(4, 5)), 4, 5));  // unbacked pages stand alone
  BOOST_TEST(same(span.widened(range(7, 12)), 7, 12));
  BOOST_TEST(same(span.widened(range(2, 2)), 2, 2));
}

BOOST_AUTO_TEST_CASE(ranges_shrink_to_whole_frames) {
  const Span span = mixed();
  BOOST_TEST(same(span.narrowed(range(0, 8)), 0, 8));
  BOOST_TEST(same(span.narrowed(range(1, 8)), 4, 8));
  BOOST_TEST(same(span.narrowed(range(0, 6)), 0, 5));
  BOOST_TEST(span.narrowed(range(1, 3)).is_empty());
  BOOST_TEST(span.narrowed(range(1, 4)).is_empty());
  BOOST_TEST(same(span.narrowed(range(0, 4)), 0, 4));
  BOOST_TEST(span.narrowed(range(6, 7)).is_empty());
}

BOOST_AUTO_TEST_CASE(replacing_and_clearing_keep_the_count) {
  Span span = mixed();
  span.set(Pages(0), std::vector<PageEntry>{{FrameId(SizeClass(0), 1), Pages(0)}, {}, {}, {}});
  BOOST_TEST((span.backed_pages() == Pages(4)));
  span.clear(range(5, 8));
  BOOST_TEST((span.backed_pages() == Pages(1)));
  BOOST_TEST((span.end() == Pages(1)));  // the unbacked tail goes
  span.clear(range(0, 16));
  BOOST_TEST((span.backed_pages() == Pages(0)));
  BOOST_TEST((span.end() == Pages(0)));
}

BOOST_AUTO_TEST_CASE(a_broken_span_stays_broken) {
  Span span = mixed();
  BOOST_TEST(!span.is_broken());
  span.mark_broken();
  span.clear(range(0, 16));
  BOOST_TEST(span.is_broken());
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
