// Batches: one step for all rows or for none, arrays that stay where they are, and rows that are
// permuted, repeated and dropped by remapping.
#include <boost/test/unit_test.hpp>

#include "cache/rig.hpp"

namespace kvspan::test {
namespace {

// Rows of 60, 61, ... tokens in adjacent slots, marked 1, 2, ...
std::shared_ptr<Batch> rows_of(Rig& rig, std::int32_t n) {
  auto batch = rig.cache->adjacent_batch(n);
  for (std::int32_t i = 0; i < n; ++i) {
    const auto& row = batch->rows()[static_cast<std::size_t>(i)];
    row->extend(Tokens(60 + i), {});
    rig.write(*row, i + 1, 0, 60 + i);
  }
  return batch;
}

void select(Batch& batch, const std::vector<std::int32_t>& rows) { batch.select(rows, {}); }

// Whether row i is what the row marked marks[i] was, in slot first + i.
bool rows_are(Rig& rig, const Batch& batch, const std::vector<std::int32_t>& marks) {
  bool ok = batch.size() == marks.size();
  for (std::size_t i = 0; ok && i < marks.size(); ++i) {
    const Sequence& row = *batch.rows()[i];
    const std::int32_t slot = batch.lease()->first.value + static_cast<std::int32_t>(i);
    ok = row.length() == Tokens(59 + marks[i]) && rig.holds(row, marks[i], 0, row.length().value) &&
         row.slot().value == slot && batch.arrays()->host(BatchArrays::Which::slots)[i] == slot &&
         batch.arrays()->host(BatchArrays::Which::lengths)[i] == row.length().value;
  }
  return ok && figures_add_up(rig);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(batch)

BOOST_AUTO_TEST_CASE(a_step_grows_every_row_and_keeps_the_arrays_in_place) {
  Rig rig;
  const auto a = rig.grown(1, 50), b = rig.grown(2, 7);
  const auto batch = rig.cache->batch({b, a});
  const std::int32_t* const lengths = batch->arrays()->host(BatchArrays::Which::lengths).data();
  for (int i = 0; i < 100; ++i) batch->step(Tokens(1), {});
  batch->step(Tokens(3), {});
  BOOST_TEST(lengths == batch->arrays()->host(BatchArrays::Which::lengths).data());
  BOOST_TEST(
      batch->arrays()->host(BatchArrays::Which::before) == (std::vector<std::int32_t>{107, 150}),
      boost::test_tools::per_element());
  BOOST_TEST(
      batch->arrays()->host(BatchArrays::Which::lengths) == (std::vector<std::int32_t>{110, 153}),
      boost::test_tools::per_element());
  BOOST_TEST((batch->arrays()->host(BatchArrays::Which::slots)[0] == b->slot().value));
  BOOST_TEST(rig.holds(*a, 1, 0, 50));
  BOOST_TEST(rig.holds(*b, 2, 0, 7));
  BOOST_TEST(figures_add_up(rig));
}

BOOST_AUTO_TEST_CASE(all_rows_step_or_none) {
  Rig rig({.n_pages = 46, .layers_per_page = 2, .keep = Bytes(0)});
  const auto a = rig.grown(1, 999), b = rig.grown(2, 51);
  const auto batch = rig.cache->batch({b, a});
  BOOST_CHECK_THROW(batch->step(Tokens(2), {}), CapacityError);  // max_seq_len is 1,000
  BOOST_CHECK_THROW(batch->step(Tokens(0), {}), InvalidArgument);
  BOOST_TEST((b->length() == Tokens(51)));
  const auto c = rig.grown(3, 51), d = rig.grown(4, 25);  // 40 + 2 + 2 + 1 of 46 pages
  const auto others = rig.cache->batch({b, c, d});
  BOOST_CHECK_THROW(others->step(Tokens(1), {}), OutOfMemory);  // each crosses into a new page
  BOOST_TEST((b->length() == Tokens(51)));
  BOOST_TEST((d->length() == Tokens(25)));
  BOOST_TEST(figures_add_up(rig));
  c->release({});
  BOOST_CHECK_THROW(others->step(Tokens(1), {}), ReleasedError);
  BOOST_TEST((b->length() == Tokens(51)));
  rig.cache->batch({b, d})->step(Tokens(1), {});
}

BOOST_AUTO_TEST_CASE(rows_that_cannot_be_are_refused) {
  Rig rig, other;
  const auto a = rig.grown(1, 5), foreign = other.grown(1, 5), gone = rig.grown(2, 5);
  gone->release({});
  BOOST_CHECK_THROW(rig.cache->batch({}), InvalidArgument);
  BOOST_CHECK_THROW(rig.cache->batch({a, a}), InvalidArgument);
  BOOST_CHECK_THROW(rig.cache->batch({a, foreign}), InvalidArgument);
  BOOST_CHECK_THROW(rig.cache->batch({a, gone}), ReleasedError);
  const auto loose = rig.cache->batch({a});
  BOOST_CHECK_THROW(select(*loose, {0}), InvalidArgument);
  const auto batch = rig.cache->adjacent_batch(2);
  BOOST_CHECK_THROW(select(*batch, {}), InvalidArgument);
  BOOST_CHECK_THROW(select(*batch, {2}), InvalidArgument);
  BOOST_CHECK_THROW(select(*batch, {-1}), InvalidArgument);
  BOOST_CHECK_THROW(select(*batch, {0, 1, 0}), InvalidArgument);
  BOOST_CHECK_THROW(rig.cache->adjacent_batch(0), InvalidArgument);
  BOOST_CHECK_THROW(rig.cache->adjacent_batch(7), CapacityError);
}

BOOST_AUTO_TEST_CASE(rows_permute_repeat_drop_and_come_back) {
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    for (const std::int32_t layers_per_page : {1, 2}) {
      Rig rig({.n_pages = 128, .largest_class = largest_class, .layers_per_page = layers_per_page});
      const auto batch = rows_of(rig, 4);
      const auto third = batch->rows()[2];
      select(*batch, {2, 0, 3, 1});
      BOOST_TEST(rows_are(rig, *batch, {3, 1, 4, 2}));
      BOOST_TEST((batch->rows()[0] == third));  // handles go with their rows
      select(*batch, {1, 1, 0, 1});
      BOOST_TEST(rows_are(rig, *batch, {1, 1, 3, 1}));
      // Frames of several pages are shared whole or not at all, and two pages may be one frame.
      BOOST_TEST((largest_class > 0 || rig.cache->figures().shared > Bytes(0)));
      select(*batch, {2, 0});
      BOOST_TEST(rows_are(rig, *batch, {3, 1}));
      select(*batch, {0, 1, 1, 0});
      BOOST_TEST(rows_are(rig, *batch, {3, 1, 1, 3}));
      BOOST_TEST(rig.backend->violations().empty());
    }
  }
}

BOOST_AUTO_TEST_CASE(repeated_rows_write_apart) {
  Rig rig;
  const auto batch = rows_of(rig, 3);
  select(*batch, {0, 0, 0});
  batch->step(Tokens(1), {});
  for (std::size_t i = 0; i < 3; ++i) {
    rig.write(*batch->rows()[i], 10 + static_cast<std::int32_t>(i), 60, 61);
  }
  for (std::size_t i = 0; i < 3; ++i) {
    BOOST_TEST(rig.holds(*batch->rows()[i], 10 + static_cast<std::int32_t>(i), 60, 61));
    BOOST_TEST(rig.holds(*batch->rows()[i], 1, 0, 60));
  }
}

BOOST_AUTO_TEST_CASE(dropped_rows_are_released_and_their_pages_gone) {
  Rig rig;
  const auto batch = rows_of(rig, 3);
  const auto dropped = batch->rows()[1];
  select(*batch, {2});
  BOOST_TEST(dropped->is_released());
  BOOST_CHECK_THROW(dropped->extend(Tokens(1), {}), ReleasedError);
  BOOST_TEST(rig.cache->figures().n_sequences == 1);
  BOOST_TEST((rig.cache->figures().mapped == kTestPage * 3));
  // The slots stay the batch's, for rows that come back.
  BOOST_CHECK_THROW(rig.cache->adjacent_batch(6), CapacityError);
}

BOOST_AUTO_TEST_CASE(a_row_that_its_owner_released_need_not_be_selected) {
  Rig rig;
  const auto batch = rows_of(rig, 3);
  batch->rows()[1]->release({});
  BOOST_CHECK_THROW(select(*batch, {0, 1}), ReleasedError);
  select(*batch, {2, 0});
  BOOST_TEST(rows_are(rig, *batch, {3, 1}));
}

BOOST_AUTO_TEST_CASE(refresh_sees_what_was_done_to_rows_by_themselves) {
  Rig rig;
  const auto batch = rows_of(rig, 2);
  batch->rows()[1]->extend(Tokens(9), {});
  batch->rows()[0]->truncate(Tokens(3), {});
  BOOST_TEST(batch->arrays()->host(BatchArrays::Which::lengths)[1] ==
             0);  // as of the last refresh: before they grew
  batch->refresh({});
  BOOST_TEST(
      batch->arrays()->host(BatchArrays::Which::lengths) == (std::vector<std::int32_t>{3, 70}),
      boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_fork_has_all_rows_in_adjacent_slots_of_its_own) {
  Rig rig;
  const auto batch = rows_of(rig, 4);
  select(*batch, {1, 3});
  const auto fork = batch->fork({});
  BOOST_TEST(fork->lease()->count == 4);
  BOOST_TEST(rows_are(rig, *fork, {2, 4}));
  fork->step(Tokens(9), {});
  for (const auto& row : fork->rows()) {
    const auto length = static_cast<std::int32_t>(row->length().value);
    rig.write(*row, 7, length - 9, length);
  }
  BOOST_TEST(rows_are(rig, *batch, {2, 4}));
  select(*batch, {1});
  BOOST_TEST(rig.holds(*fork->rows()[0], 2, 0, 61));
  BOOST_TEST(figures_add_up(rig));
  BOOST_CHECK_THROW(batch->fork({}), CapacityError);
  const auto listed = rig.cache->batch({batch->rows()[0]});
  BOOST_CHECK_THROW(listed->fork({}), InvalidArgument);
}

BOOST_AUTO_TEST_CASE(slots_come_back_when_batch_and_rows_are_gone) {
  Rig rig;
  auto batch = rows_of(rig, 8);
  BOOST_CHECK_THROW(rig.cache->sequence(Tokens(0)), CapacityError);
  select(*batch, {3});
  BOOST_CHECK_THROW(rig.cache->sequence(Tokens(0)), CapacityError);
  const auto kept = batch->rows()[0];
  batch.reset();
  BOOST_TEST(rig.cache->adjacent_batch(7)->size() == 7u);
  BOOST_TEST(rig.holds(*kept, 4, 0, 63));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
