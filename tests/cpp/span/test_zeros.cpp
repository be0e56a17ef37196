// Windows that read as zeros: which frames of zeros stand where, and that few do.
#include <fcntl.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>

#include "backend/host_backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "span/edit.hpp"
#include "span/zeros.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {
namespace {

constexpr Bytes kPage = kKiB * 64;

struct Window {
  explicit Window(std::uint32_t n_pages, std::uint8_t largest = 3, std::uint32_t capacity = 256,
                  std::uint64_t n_windows = 1) {
    const SizeClass c(largest);
    auto owned = std::make_unique<FaultyBackend>(make_host_backend({.page_size = kPage,
                                                                    .capacity = kPage * capacity,
                                                                    .largest_class = c,
                                                                    .huge_pages = false}));
    backend = owned.get();
    backend->have_no_zeros();
    store = std::make_unique<FrameStore>(std::move(owned), kPage * capacity, c);
    zeros = std::make_unique<Zeros>(*store, account, n_windows, Pages(n_pages));
    range = backend->reserve(kPage * (n_pages + 8), Unmapped::fault);
    span = std::make_unique<Span>(range.base, Pages(n_pages + 8), kPage, Pages(n_pages),
                                  zeros->set_of(0));
    Edit edit(*store, account, {});
    edit.show_zeros(*span);
    edit.commit();
  }
  ~Window() {
    drop(0, span->size().value);
    backend->unmap({range.base, kPage * span->window().value}, n_zeros());
    backend->free(range);
    zeros.reset();
    BOOST_TEST(backend->violations().empty());
    BOOST_TEST((store->counts().in_use == Bytes(0)));
  }

  void back(std::uint32_t first, std::uint32_t last) {
    Edit edit(*store, account, {});
    edit.back(*span, {Pages(first), Pages(last)}, OwnerTag(7), false);
    edit.commit();
  }
  void drop(std::uint32_t first, std::uint32_t last) {
    Edit edit(*store, account, {});
    edit.drop(*span, {Pages(first), Pages(last)});
    edit.commit();
  }
  // Frames of zeros in the window; every page of it that is not backed must be in one.
  std::uint32_t n_zeros() const {
    std::uint32_t n = 0;
    for (Pages page{}; page < span->window(); ++page) {
      const PageEntry entry = span->mapped(page);
      BOOST_TEST(entry.is_mapped());
      if (entry.is_zeros() && entry.offset() == Pages(0)) ++n;
      if (entry.is_zeros()) {
        BOOST_TEST(*reinterpret_cast<const std::int64_t*>(span->address_of(page).value) == 0);
      }
    }
    return n;
  }

  FaultyBackend* backend;
  std::unique_ptr<FrameStore> store;
  CallCounters account;
  std::unique_ptr<Zeros> zeros;
  VirtualRange range{};
  std::unique_ptr<Span> span;
};

}  // namespace

BOOST_AUTO_TEST_SUITE(zeros)

BOOST_AUTO_TEST_CASE(a_gap_takes_few_frames_small_ones_first) {
  Window w(45);  // 1 + 4 + 5 * 8
  BOOST_TEST(w.n_zeros() == 7u);
  BOOST_TEST((w.span->frame_of(Pages(0)).count() == Pages(1)));
  BOOST_TEST((w.span->frame_of(Pages(1)).count() == Pages(4)));
  BOOST_TEST((w.span->frame_of(Pages(5)).count() == Pages(8)));
  BOOST_TEST((w.span->end() == Pages(0)));
  BOOST_TEST((w.span->backed_pages() == Pages(0)));
  BOOST_TEST((w.zeros->size() == kPage * 15));
}

BOOST_AUTO_TEST_CASE(growing_page_by_page_touches_two_frames_of_zeros_a_page) {
  Window w(64, 3);
  const std::uint64_t before = w.account.of(Call::map).handles;
  for (std::uint32_t page = 0; page < 64; ++page) w.back(page, page + 1);
  BOOST_TEST((w.span->backed_pages() == Pages(64)));
  BOOST_TEST(w.n_zeros() == 0u);
  BOOST_TEST(w.account.of(Call::map).handles - before <= 64u * 3);
}

BOOST_AUTO_TEST_CASE(what_is_dropped_joins_the_zeros_next_to_it) {
  Window w(40);
  for (std::uint32_t page = 0; page < 40; ++page) w.back(page, page + 1);
  for (std::uint32_t page = 40; page-- > 0;) w.drop(page, page + 1);
  BOOST_TEST(w.n_zeros() <= 5u + 3);
  w.back(3, 4);  // in the middle: zeros on both sides
  BOOST_TEST(w.n_zeros() <= 5u + 3 + 4);
  BOOST_TEST(w.span->mapped(Pages(2)).is_zeros());
  BOOST_TEST(w.span->mapped(Pages(4)).is_zeros());
}

BOOST_AUTO_TEST_CASE(beyond_the_window_there_are_none) {
  Window w(10);
  w.back(0, 14);
  w.drop(6, 14);
  BOOST_TEST(w.span->mapped(Pages(9)).is_zeros());
  BOOST_TEST(!w.span->mapped(Pages(10)).is_mapped());
}

BOOST_AUTO_TEST_CASE(zeros_cannot_be_written) {
  const Window w(8);
  const int source = open("/dev/zero", O_RDONLY);
  BOOST_REQUIRE(source >= 0);
  // The kernel says what a store would say with a signal.
  BOOST_TEST(read(source, reinterpret_cast<void*>(w.range.base.value), 1) == -1);
  BOOST_TEST(errno == EFAULT);
  close(source);
}

BOOST_AUTO_TEST_CASE(a_set_serves_a_limited_number_of_windows) {
  Window few(4096, 0, 8192, 3);  // a page each: 4,096 mappings of one frame are the most
  BOOST_TEST((few.zeros->size() == kPage * 3));
  Window many(64, 3, 256, 300);
  BOOST_TEST((many.zeros->size() == kPage * 15));
}

BOOST_AUTO_TEST_CASE(a_pool_without_large_frames_left_makes_do_with_small_ones) {
  Window w(64, 3, 80);
  w.store->create_ahead(kPage * 60);  // single pages: 5 are left for others
  const Zeros small(*w.store, w.account, 1, Pages(64));
  BOOST_TEST((small.size() == kPage * 15));
  BOOST_TEST(small.set_of(0).frames.size() == 2u);  // of 1 page and of 2
}

BOOST_AUTO_TEST_CASE(zeros_that_do_not_fit_are_refused) {
  Window w(64, 3, 80);
  BOOST_CHECK_THROW(Zeros(*w.store, w.account, 5000, Pages(64)), OutOfMemory);
  BOOST_TEST((w.store->counts().in_use == kPage * 15));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
