// Pages that a kernel may still read are not unmapped, remapped or handed out before its fence.
#include <boost/test/unit_test.hpp>

#include "cache/rig.hpp"

namespace kvspan::test {

BOOST_AUTO_TEST_SUITE(fences)

BOOST_AUTO_TEST_CASE(released_pages_wait_for_the_work_that_reads_them) {
  Rig rig({.n_pages = 8, .layers_per_page = 2});
  rig.backend->set_manual_fences(true);
  rig.grown(1, 150)->release({});
  const std::uint64_t unmapped = rig.backend->calls().of(Call::unmap).calls;
  BOOST_TEST(!rig.backend->unpassed().empty());
  // Unhurried reclamation leaves them alone, a hurried one waits.
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(0)));
  BOOST_TEST(rig.backend->calls().of(Call::unmap).calls == unmapped);
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::waited) > Pages(0)));
  BOOST_TEST(!rig.backend->waited_for().empty());
}

BOOST_AUTO_TEST_CASE(work_in_a_slot_comes_after_that_of_its_last_sequence) {
  Rig rig({.max_seqs = 1, .keep = kGiB});
  rig.backend->set_manual_fences(true);
  rig.grown(1, 150)->release({});
  const auto ordered = [&] { return rig.backend->calls().of(Call::order_after).calls; };
  BOOST_TEST(ordered() == 0u);
  const auto next = rig.cache->sequence(Tokens(150));
  BOOST_TEST(ordered() == 1u);
  next->extend(Tokens(1), {});  // perhaps on another stream
  BOOST_TEST(ordered() == 2u);
  BOOST_TEST(rig.backend->waited_for().empty());  // nobody sat and waited
  // The old work still holds the pages, whoever is in the slot.
  next->release({});
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(0)));
  rig.backend->pass_all();
  const auto last = rig.cache->sequence(Tokens(150));
  const std::uint64_t before = ordered();
  last->extend(Tokens(1), {});
  BOOST_TEST(ordered() == before);
}

BOOST_AUTO_TEST_CASE(a_shared_page_is_exchanged_only_when_its_readers_are_done) {
  Rig rig;
  const auto a = rig.grown(1, 150);
  const auto b = a->fork(1, {}, {}).front();
  rig.backend->set_manual_fences(true);
  b->truncate(Tokens(20), {});
  BOOST_TEST(rig.backend->waited_for().empty());
  b->extend(Tokens(1), {});
  BOOST_TEST(!rig.backend->waited_for().empty());
  rig.write(*b, 9, 20, 21);
  BOOST_TEST(rig.holds(*a, 1, 0, 150));
  BOOST_TEST(rig.holds(*b, 1, 0, 20));
}

BOOST_AUTO_TEST_CASE(rows_are_remapped_only_when_their_work_is_done) {
  Rig rig;
  const auto batch = rig.cache->adjacent_batch(2);
  for (const auto& row : batch->rows()) row->extend(Tokens(60), {});
  rig.backend->set_manual_fences(true);
  const std::int32_t order[] = {1, 0};
  batch->select(order, {});
  BOOST_TEST(rig.backend->waited_for().size() == 1u);
}

BOOST_AUTO_TEST_CASE(an_order_that_fails_is_made_good_by_the_next) {
  Rig rig({.max_seqs = 1, .keep = kGiB});
  rig.backend->set_manual_fences(true);
  rig.grown(1, 150)->release({});
  rig.backend->fail(1, Fault::driver, Call::order_after);
  BOOST_CHECK_THROW(rig.cache->sequence(Tokens(150)), DriverError);
  BOOST_TEST(rig.backend->unpassed().size() == 1u);
  const std::uint64_t ordered = rig.backend->calls().of(Call::order_after).calls;
  const auto next = rig.cache->sequence(Tokens(150));
  BOOST_TEST(rig.backend->calls().of(Call::order_after).calls == ordered + 1);
}

BOOST_AUTO_TEST_CASE(a_fork_waits_for_the_last_work_in_its_slot) {
  Rig rig({.max_seqs = 2, .keep = kGiB});
  const auto a = rig.grown(1, 150);
  rig.backend->set_manual_fences(true);
  rig.grown(2, 150)->release({});
  rig.backend->fail(1, Fault::driver, Call::wait_fence);
  BOOST_CHECK_THROW(a->fork(1, {}, {}), DriverError);
  BOOST_TEST(rig.backend->unpassed().size() == 1u);
  const auto b = a->fork(1, {}, {}).front();
  BOOST_TEST(rig.backend->unpassed().empty());
  BOOST_TEST(rig.holds(*b, 1, 0, 150));
}

BOOST_AUTO_TEST_CASE(rows_wait_for_work_on_other_streams_before_they_are_remapped) {
  Rig rig;
  const auto batch = rig.cache->adjacent_batch(2);
  for (const auto& row : batch->rows()) row->extend(Tokens(120), {});
  rig.backend->set_manual_fences(true);
  batch->rows().front()->truncate(Tokens(60), {});
  const std::int32_t order[] = {1, 0};
  batch->select(order, {});
  BOOST_TEST(rig.backend->unpassed().empty());
}

BOOST_AUTO_TEST_CASE(a_surplus_stays_mapped_until_the_fence_of_its_truncate) {
  Rig rig({.layers_per_page = 2, .keep = Bytes(0)});
  const auto a = rig.grown(1, 500);
  rig.backend->set_manual_fences(true);
  const Bytes mapped = rig.cache->figures().mapped;
  a->truncate(Tokens(10), {});
  BOOST_TEST((rig.cache->figures().mapped == mapped));
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(0)));
  rig.backend->pass_all();
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) > Pages(0)));
  BOOST_TEST(rig.backend->waited_for().empty());
  BOOST_TEST(rig.holds(*a, 1, 0, 10));
}

// A stride's last pages are taken back before anybody used them: not under what zeroes them.
BOOST_AUTO_TEST_CASE(what_a_stride_has_left_over_stays_until_it_is_zeroed) {
  Rig rig({.n_pages = 70,
           .largest_class = 1,
           .max_seqs = 71,
           .keep = kTestPage,
           .scrub = Scrub::reuse,
           .max_seq_len = 5000});
  {
    std::vector<std::shared_ptr<Sequence>> all;
    for (int i = 0; i < 70; ++i) all.push_back(rig.grown(i, 25));  // a page each
  }
  rig.cache->trim();
  const auto a = rig.cache->sequence(Tokens(0));
  rig.backend->set_manual_fences(true);
  a->extend(Tokens(1650), {});  // 65 pages, of which two make a stride
  BOOST_TEST((rig.cache->figures().ahead == kTestPage));
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(0)));
  rig.backend->pass_all();
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(1)));
  BOOST_TEST(rig.backend->violations().empty());
}

// Pages that a fork left in its slot, because its work was not done when it was released, free no
// memory when they are unmapped.
BOOST_AUTO_TEST_CASE(shared_pages_in_free_slots_are_not_taken_for_memory) {
  Rig rig({.n_pages = 20, .layers_per_page = 2, .keep = kGiB});
  const auto parent = rig.grown(1, 204);  // 8 pages, the last partly filled
  std::vector<std::shared_ptr<Sequence>> gone;
  for (int i = 0; i < 3; ++i) gone.push_back(parent->fork(1, {}, {}).front());
  const auto own = rig.grown(2, 204);
  BOOST_TEST((rig.store->counts().in_use == kTestPage * 19));
  rig.backend->set_manual_fences(true);
  for (const auto& s : gone) s->release({});
  own->release({});
  rig.backend->pass_all();
  const auto next = rig.cache->sequence(Tokens(0));
  const auto last = rig.cache->sequence(Tokens(0));
  next->extend(Tokens(102), {});
  last->extend(Tokens(204), {});
  BOOST_TEST(rig.holds(*parent, 1, 0, 204));
}

// Kernels of static shape read all of a window: whatever goes from there waits for them.
BOOST_AUTO_TEST_CASE(zeros_make_way_only_when_their_readers_are_done) {
  Rig rig({.layers_per_page = 2, .static_len = Tokens(500)});
  const auto a = rig.cache->sequence(Tokens(0));
  rig.backend->set_manual_fences(true);
  a->extend(Tokens(1), {});
  BOOST_TEST(rig.backend->waited_for().size() == 1u);
  const auto child = a->fork(1, {}, {}).front();
  BOOST_TEST(rig.backend->waited_for().size() == 2u);
  // Next to the end of what is mapped, and still nothing ahead of need.
  a->extend(Tokens(22), {});
  BOOST_TEST(rig.store->background().turn().n_frames == 0u);
  BOOST_TEST(rig.backend->waited_for().size() == 2u);
  // Past the window nobody reads: what is there was never mapped.
  a->extend(Tokens(480), {});
  const std::size_t waited = rig.backend->waited_for().size();
  a->extend(Tokens(100), {});
  BOOST_TEST(rig.backend->waited_for().size() == waited);
  BOOST_TEST(rig.backend->violations().empty());
}

BOOST_AUTO_TEST_CASE(a_surplus_in_a_window_waits_for_work_since_its_truncate) {
  Rig rig({.keep = kGiB, .static_len = Tokens(1000)});
  const auto a = rig.grown(1, 300);
  a->truncate(Tokens(10), {});
  rig.backend->set_manual_fences(true);
  // The fence of the truncate is passed; a kernel that was queued since may read the surplus.
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::idle) == Pages(0)));
  BOOST_TEST(rig.backend->waited_for().empty());
  BOOST_TEST((rig.cache->reclaim(Pages(100), Reach::waited) > Pages(0)));
  BOOST_TEST(rig.backend->waited_for().size() == 1u);
  BOOST_TEST(rig.windows_read_as_zeros());
  BOOST_TEST(rig.holds(*a, 1, 0, 10));
}

BOOST_AUTO_TEST_CASE(a_close_that_cannot_unmap_leaks_and_frees_nothing_under_a_mapping) {
  Rig rig({.static_len = Tokens(100)});
  auto a = rig.grown(1, 200);
  rig.backend->fail(1, Fault::driver, Call::unmap, FaultyBackend::kEver);
  rig.cache->close();
  a.reset();
  rig.cache.reset();
  rig.backend->fail_no_more();
  rig.store->trim();
  BOOST_TEST(rig.backend->violations().empty());
  BOOST_TEST((rig.store->counts().in_use > Bytes(0)));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
