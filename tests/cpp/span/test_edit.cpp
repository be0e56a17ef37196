// Edits: what they do to bytes that are really mapped, what they share, and that a failure leaves
// tables, mappings and reference counts alone.
#include <boost/test/unit_test.hpp>
#include <memory>

#include "backend/host_backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "span/edit.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {
namespace {

constexpr Bytes kPage = kKiB * 64;

// Two spans of 16 pages in one reservation, over a pool of 32.
struct Rig {
  explicit Rig(std::uint8_t largest_class = 0) {
    auto owned = std::make_unique<FaultyBackend>(
        make_host_backend({.page_size = kPage,
                           .capacity = kPage * 32,
                           .largest_class = SizeClass(largest_class),
                           .huge_pages = false}));
    backend = owned.get();
    store = std::make_unique<FrameStore>(std::move(owned), kPage * 32, SizeClass(largest_class));
    owner = store->new_owner();
    reservation = backend->reserve(kPage * 32, Unmapped::zero);
    a = std::make_unique<Span>(reservation.base, Pages(16), kPage);
    b = std::make_unique<Span>(reservation.base + kPage * 16, Pages(16), kPage);
  }
  ~Rig() {
    for (Span* span : {a.get(), b.get()}) {
      Edit edit = this->edit();
      edit.drop(*span, {Pages(0), Pages(16)});
      edit.commit();
    }
    backend->free(reservation);
    BOOST_TEST((store->counts().in_use == Bytes(0)));
    BOOST_TEST(backend->violations().empty());
  }

  Edit edit() { return {*store, account, {}}; }
  void back(Span& span, std::uint32_t first, std::uint32_t last, bool always_scrub = false) {
    Edit edit = this->edit();
    edit.back(span, {Pages(first), Pages(last)}, owner, always_scrub);
    edit.commit();
  }
  // Puts the first n pages of `a` into `b`.
  std::int64_t share(std::uint32_t n) {
    std::vector<PageEntry> entries;
    for (std::uint32_t page = 0; page < n; ++page) entries.push_back((*a)[Pages(page)]);
    Edit edit = this->edit();
    edit.place(*b, Pages(0), entries, owner, false);
    edit.commit();
    return edit.shared_pages();
  }
  std::uint64_t pages_in_use() const { return store->counts().in_use.value / kPage.value; }

  FaultyBackend* backend;
  std::unique_ptr<FrameStore> store;
  OwnerTag owner;
  CallCounters account;
  VirtualRange reservation;
  std::unique_ptr<Span> a, b;
};

// The first word of a page.
std::uint64_t& word(const Span& span, std::uint32_t page) {
  return *reinterpret_cast<std::uint64_t*>(span.address_of(Pages(page)).value);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(edit)

BOOST_AUTO_TEST_CASE(backing_fills_only_the_gaps) {
  Rig rig(2);
  rig.back(*rig.a, 3, 4);
  word(*rig.a, 3) = 33;
  rig.back(*rig.a, 0, 11);
  BOOST_TEST((rig.a->backed_pages() == Pages(11)));
  BOOST_TEST(rig.pages_in_use() == 11u);
  BOOST_TEST(word(*rig.a, 3) == 33u);
  for (std::uint32_t page = 0; page < 11; ++page) word(*rig.a, page) = page;
  for (std::uint32_t page = 0; page < 11; ++page) BOOST_TEST(word(*rig.a, page) == page);
  // 0-2 and 4-10 are two gaps: 2 + 1 and 4 + 2 + 1.
  BOOST_TEST((rig.a->frame_of(Pages(4)).count() == Pages(4)));
  BOOST_TEST((rig.a->frame_of(Pages(0)).count() == Pages(2)));
}

BOOST_AUTO_TEST_CASE(planning_touches_nothing) {
  Rig rig;
  const std::uint64_t maps = rig.backend->calls().of(Call::map).calls;
  {
    Edit edit = rig.edit();
    BOOST_TEST(edit.is_empty());
    edit.back(*rig.a, {Pages(0), Pages(4)}, rig.owner, false);
    BOOST_TEST(!edit.is_empty());
  }
  BOOST_TEST(rig.backend->calls().of(Call::map).calls == maps);
  BOOST_TEST(rig.pages_in_use() == 0u);
  BOOST_TEST((rig.a->backed_pages() == Pages(0)));
}

BOOST_AUTO_TEST_CASE(adjacent_frames_are_mapped_by_one_call) {
  Rig rig;
  rig.back(*rig.a, 0, 8);
  BOOST_TEST(rig.account.of(Call::map).calls == 1u);
  BOOST_TEST(rig.account.of(Call::map).handles == 8u);
}

BOOST_AUTO_TEST_CASE(placed_pages_are_the_same_memory) {
  Rig rig;
  rig.back(*rig.a, 0, 3);
  BOOST_TEST(rig.share(3) == 3);
  BOOST_TEST(rig.pages_in_use() == 3u);
  word(*rig.a, 1) = 7;
  BOOST_TEST(word(*rig.b, 1) == 7u);
  BOOST_TEST(rig.store->references((*rig.a)[Pages(1)].frame) == 2u);
  BOOST_TEST(rig.share(3) == 0);  // the same again: nothing to do
  BOOST_TEST(rig.store->references((*rig.a)[Pages(1)].frame) == 2u);
}

BOOST_AUTO_TEST_CASE(owning_copies_the_live_bytes_of_shared_frames_only) {
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    Rig rig(largest_class);
    rig.back(*rig.a, 0, 4);
    for (std::uint32_t page = 0; page < 4; ++page) word(*rig.a, page) = 10 + page;
    rig.share(4);
    rig.back(*rig.b, 4, 6);
    const PageEntry alone = (*rig.b)[Pages(5)];
    Edit edit = rig.edit();
    // From page 1 on, of which one page and a word are live.
    edit.own(*rig.b, {Pages(1), Pages(6)}, kPage + Bytes(8), rig.owner, false);
    edit.commit();
    BOOST_TEST(edit.shared_pages() == (largest_class == 0 ? -3 : -4));
    BOOST_TEST(((*rig.b)[Pages(5)] == alone));
    BOOST_TEST(word(*rig.b, 1) == 11u);
    BOOST_TEST(word(*rig.b, 2) == 12u);
    word(*rig.b, 1) = word(*rig.b, 2) = word(*rig.b, 3) = 99;
    for (std::uint32_t page = 0; page < 4; ++page) BOOST_TEST(word(*rig.a, page) == 10 + page);
    BOOST_TEST(word(*rig.b, 0) == 10u);  // whole frames: class 2 has copied it, class 0 shares it
  }
}

BOOST_AUTO_TEST_CASE(dropping_takes_whole_frames_only) {
  Rig rig(2);
  rig.back(*rig.a, 0, 8);  // two frames of 4 pages
  Edit edit = rig.edit();
  edit.drop(*rig.a, {Pages(2), Pages(8)});
  edit.commit();
  BOOST_TEST((rig.a->backed_pages() == Pages(4)));
  BOOST_TEST((rig.a->end() == Pages(4)));
  BOOST_TEST(rig.pages_in_use() == 4u);
  BOOST_TEST(word(*rig.a, 5) == 0u);  // reads as zeros where nothing is mapped
  Edit nothing = rig.edit();
  nothing.drop(*rig.a, {Pages(1), Pages(3)});
  BOOST_TEST(nothing.is_empty());
}

BOOST_AUTO_TEST_CASE(copies_come_after_the_mapping) {
  Rig rig;
  rig.back(*rig.a, 0, 1);
  word(*rig.a, 0) = 5;
  Edit edit = rig.edit();
  edit.back(*rig.b, {Pages(0), Pages(1)}, rig.owner, false);
  edit.copy(rig.b->address_of(Pages(0)), rig.a->address_of(Pages(0)), Bytes(8));
  edit.commit();
  BOOST_TEST(word(*rig.b, 0) == 5u);
  word(*rig.b, 0) = 6;
  BOOST_TEST(word(*rig.a, 0) == 5u);
}

BOOST_AUTO_TEST_CASE(recycled_frames_are_scrubbed_when_asked) {
  Rig rig;
  for (const bool always_scrub : {false, true}) {
    rig.back(*rig.a, 0, 2, always_scrub);
    BOOST_TEST(word(*rig.a, 0) == 0u);
    word(*rig.a, 0) = word(*rig.a, 1) = 77;
    Edit edit = rig.edit();
    edit.drop(*rig.a, {Pages(0), Pages(2)});
    edit.commit();
    if (always_scrub) continue;
    rig.back(*rig.a, 0, 2, false);
    BOOST_TEST(word(*rig.a, 0) == 77u);  // its own bytes, as they were
    Edit again = rig.edit();
    again.drop(*rig.a, {Pages(0), Pages(2)});
    again.commit();
  }
}

// A swap of two spans' pages, failed at every call.
BOOST_AUTO_TEST_CASE(an_edit_happens_whole_or_not_at_all) {
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    for (std::uint64_t n = 1;; ++n) {
      Rig rig(largest_class);
      rig.back(*rig.a, 0, 5);
      rig.back(*rig.b, 0, 7);
      for (std::uint32_t page = 0; page < 5; ++page) word(*rig.a, page) = 10 + page;
      for (std::uint32_t page = 0; page < 7; ++page) word(*rig.b, page) = 20 + page;
      std::vector<PageEntry> of_a, of_b;
      for (Pages page{}; page < Pages(7); ++page) of_a.push_back((*rig.a)[page]);
      for (Pages page{}; page < Pages(7); ++page) of_b.push_back((*rig.b)[page]);
      rig.backend->fail(n, Fault::driver);
      Edit edit = rig.edit();
      edit.place(*rig.a, Pages(0), of_b, rig.owner, false);
      edit.place(*rig.b, Pages(0), of_a, rig.owner, false);
      edit.back(*rig.a, {Pages(8), Pages(12)}, rig.owner, false);
      bool has_thrown = false;
      try {
        edit.commit();
      } catch (const DriverError&) {
        has_thrown = true;
      }
      rig.backend->fail_no_more();
      const Span& tens = has_thrown ? *rig.a : *rig.b;
      const Span& twenties = has_thrown ? *rig.b : *rig.a;
      for (std::uint32_t page = 0; page < 5; ++page) BOOST_TEST(word(tens, page) == 10 + page);
      for (std::uint32_t page = 0; page < 7; ++page) BOOST_TEST(word(twenties, page) == 20 + page);
      BOOST_TEST(rig.pages_in_use() == (has_thrown ? 12u : 16u));
      BOOST_TEST(rig.store->references(of_a.front().frame) == 1u);
      BOOST_TEST(!rig.a->is_broken());
      if (!has_thrown) break;
      BOOST_REQUIRE(n < 50);
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
