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
  BOOST_TEST((rig.cache->reclaim(Pages(100), false) == Pages(0)));
  BOOST_TEST(rig.backend->calls().of(Call::unmap).calls == unmapped);
  BOOST_TEST((rig.cache->reclaim(Pages(100), true) > Pages(0)));
  BOOST_TEST(!rig.backend->waited_for().empty());
}

BOOST_AUTO_TEST_CASE(a_slot_is_taken_over_only_when_its_last_work_is_done) {
  Rig rig({.max_seqs = 1, .keep = kGiB});
  rig.backend->set_manual_fences(true);
  rig.grown(1, 150)->release({});
  BOOST_TEST(rig.backend->waited_for().empty());
  const auto next = rig.cache->sequence(Tokens(150));
  BOOST_TEST(rig.backend->waited_for().size() == 1u);
}

BOOST_AUTO_TEST_CASE(a_shared_page_is_exchanged_only_when_its_readers_are_done) {
  Rig rig;
  const auto a = rig.grown(1, 150);
  const auto b = a->fork({});
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

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
