// The driver fails for good in the middle of a change, and so the change cannot be undone either.
// Then the sequences whose pages are in doubt are lost: they say so, can be released, and their
// slots are not used again. Everybody else goes on.
#include <boost/test/unit_test.hpp>
#include <optional>

#include "cache/scenarios.hpp"

namespace kvspan::test {
namespace {

bool is_lost(Sequence& sequence) {
  try {
    sequence.truncate(sequence.length(), {});
    return false;
  } catch (const DriverError& e) {
    return e.code() == "lost";
  }
}

// Returns how many sequences were lost when every call failed from the n-th on; none if there was
// no n-th call.
std::optional<int> fail_from(std::uint64_t n, const Operation& operation,
                             const RigOptions& options) {
  Scene scene(options);
  operation.prepare(scene);
  scene.rig.backend->fail(n, Fault::driver, {}, FaultyBackend::kEver);
  try {
    operation.run(scene);
  } catch (const DriverError&) {
  }
  const bool has_fired = scene.rig.backend->fired();
  scene.rig.backend->fail_no_more();

  int n_lost = 0;
  const auto space = scene.rig.cache->space();
  for (const auto& [sequence, mark] : scene.sequences()) {
    BOOST_TEST(is_lost(*sequence) == space->is_broken(sequence->slot()));
    if (is_lost(*sequence)) {
      ++n_lost;
      // Not even a release that fails brings it back.
      scene.rig.backend->fail(1, Fault::driver);
      BOOST_CHECK_THROW(sequence->release({}), DriverError);
      BOOST_TEST(is_lost(*sequence));
      sequence->release({});
    } else {
      BOOST_TEST(scene.holds(*sequence, mark));
      sequence->extend(Tokens(1), {});
      BOOST_TEST(scene.holds(*sequence, mark));
      sequence->release({});
    }
  }
  scene.rows.reset();
  BOOST_TEST(scene.rig.backend->violations().empty());

  // What is broken is out of use, and the rest of the slots works.
  std::vector<std::shared_ptr<Sequence>> others;
  try {
    for (;;) others.push_back(scene.rig.grown(6, 60));
  } catch (const CapacityError&) {
  }
  for (const auto& other : others) {
    BOOST_TEST(scene.rig.holds(*other, 6, 0, 60));
    BOOST_TEST(!space->is_broken(other->slot()));
  }
  BOOST_TEST(scene.rig.backend->violations().empty());
  return has_fired ? std::optional(n_lost) : std::nullopt;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(lost)

BOOST_AUTO_TEST_CASE(what_cannot_be_undone_is_lost_and_nothing_else_is) {
  int n_lost = 0;
  for (const Operation& operation : operations()) {
    for_each_shape([&](const RigOptions& options) {
      BOOST_TEST_CONTEXT(operation.name << ", class " << int{options.largest_class} << ", "
                                        << options.layers_per_page << " layers per page") {
        for (std::uint64_t n = 1;; ++n) {
          BOOST_TEST_CONTEXT("from call " << n) {
            const std::optional<int> now = fail_from(n, operation, options);
            if (!now) break;
            n_lost += *now;
          }
        }
      }
    });
  }
  BOOST_TEST(n_lost > 0);
}

BOOST_AUTO_TEST_CASE(the_slot_of_a_lost_sequence_is_retired) {
  bool was_lost = false;
  for (std::uint64_t n = 1; !was_lost; ++n) {
    BOOST_REQUIRE(n < 50);
    Rig rig({.max_seqs = 2});
    const auto a = rig.grown(1, 150);
    const auto b = a->fork(1, {}, {}).front();
    b->truncate(Tokens(20), {});
    rig.backend->fail(n, Fault::driver, {}, FaultyBackend::kEver);
    BOOST_CHECK_THROW(b->extend(Tokens(30), {}), DriverError);
    rig.backend->fail_no_more();
    was_lost = is_lost(*b);
    if (!was_lost) continue;
    b->release({});
    BOOST_TEST(b->is_released());
    BOOST_CHECK_THROW(rig.cache->sequence(Tokens(0)), CapacityError);
    BOOST_TEST(rig.holds(*a, 1, 0, 150));
    a->release({});
    const auto c = rig.grown(3, 150);
    BOOST_TEST(rig.holds(*c, 3, 0, 150));
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
