// Every backend call fails once: each operation is tried again and again from the same start, with
// the first call failing, then the second, and so on until none is left to fail. After each failure
// the bytes, lengths and figures are as before, nothing that a strict driver forbids was done, and
// the same operation then succeeds.
#include <boost/test/unit_test.hpp>

#include "cache/scenarios.hpp"

namespace kvspan::test {
namespace {

void fail_every_call(const Operation& operation, const RigOptions& options, Fault fault) {
  int failures = 0;
  for (std::uint64_t n = 1;; ++n) {
    Scene scene(options);
    operation.prepare(scene);
    const bool with_kept = !operation.may_spend_kept;
    const std::string before = scene.figures(with_kept);
    scene.rig.backend->fail(n, fault);
    bool has_thrown = false;
    try {
      operation.run(scene);
    } catch (const OutOfMemory&) {
      has_thrown = true;
      BOOST_TEST((fault == Fault::out_of_memory));
    } catch (const DriverError&) {
      has_thrown = true;
      BOOST_TEST((fault == Fault::driver));
    }
    const bool has_fired = scene.rig.backend->fired();
    scene.rig.backend->fail_no_more();
    if (scene.other) scene.other->close();
    BOOST_TEST(figures_add_up(scene.rig));
    BOOST_TEST(scene.bytes_hold());
    BOOST_TEST(scene.rig.windows_read_as_zeros());
    if (has_thrown) {
      ++failures;
      BOOST_TEST(scene.figures(with_kept) == before);
      operation.run(scene);  // and now it works
      if (scene.other) scene.other->close();
      BOOST_TEST(figures_add_up(scene.rig));
      BOOST_TEST(scene.bytes_hold());
    }
    BOOST_TEST(scene.rig.backend->violations().empty());
    BOOST_REQUIRE(n < 200);
    if (!has_fired) break;
  }
  // Where frames come in sizes, growing for which there is no room to spare is tried once more
  // without any, so one shortage is no failure.
  const bool is_tried_twice = fault == Fault::out_of_memory && options.largest_class > 0;
  BOOST_TEST((is_tried_twice ? failures == 0 || operation.may_throw
                             : (failures > 0) == operation.may_throw));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(faults)

BOOST_AUTO_TEST_CASE(every_operation_happens_whole_or_not_at_all) {
  for (const Operation& operation : operations()) {
    for_each_shape([&](const RigOptions& options) {
      for (const Fault fault : {Fault::driver, Fault::out_of_memory}) {
        BOOST_TEST_CONTEXT(operation.name << ", class " << int{options.largest_class} << ", "
                                          << options.layers_per_page << " layers per page") {
          fail_every_call(operation, options, fault);
        }
      }
    });
  }
}

BOOST_AUTO_TEST_CASE(a_trim_that_fails_keeps_the_pages) {
  Rig rig({.keep = kGiB});
  const auto a = rig.grown(1, 300);
  a->truncate(Tokens(10), {});
  rig.backend->fail(1, Fault::driver, Call::unmap);
  BOOST_TEST((rig.cache->trim() == Bytes(0)));
  BOOST_TEST(figures_add_up(rig));
  BOOST_TEST((rig.cache->trim() > Bytes(0)));
  BOOST_TEST((rig.cache->figures().kept == Bytes(0)));
  BOOST_TEST(rig.holds(*a, 1, 0, 10));
  BOOST_TEST(rig.backend->violations().empty());
}

// A frame is dirty until it is zeroed, also when whoever was to zero it failed before.
BOOST_AUTO_TEST_CASE(a_failed_extend_does_not_launder_another_caches_bytes) {
  Rig rig({.n_pages = 3, .layers_per_page = 2, .keep = Bytes(0)});
  rig.grown(1, 70)->release({});  // all three pages
  BOOST_TEST((rig.store->counts().in_use == Bytes(0)));
  BOOST_TEST((rig.store->counts().created == kTestPage * 3));
  const auto other = Cache::make(rig.store, rig.cache_options);
  const auto b = other->sequence(Tokens(0));
  rig.backend->fail(1, Fault::driver, Call::map);
  BOOST_CHECK_THROW(b->extend(Tokens(1), {}), DriverError);
  b->extend(Tokens(70), {});
  const Address base = other->space()->span(b->slot(), 0).address_of(Pages(0));
  const auto* bytes = reinterpret_cast<const char*>(base.value);
  BOOST_TEST(std::all_of(bytes, bytes + 70 * 2 * 1280, [](char c) { return c == 0; }));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
