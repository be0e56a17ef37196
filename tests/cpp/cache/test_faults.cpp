// Every backend call fails once: each operation is tried again and again from the same start, with
// the first call failing, then the second, and so on until none is left to fail. After each failure
// the bytes, lengths and figures are as before, nothing that a strict driver forbids was done, and
// the same operation then succeeds.
#include <boost/test/unit_test.hpp>
#include <functional>
#include <string>

#include "cache/rig.hpp"

namespace kvspan::test {
namespace {

struct Scene {
  explicit Scene(const RigOptions& options) : rig(options) {
    // 130 tokens: 3 pages a lane, the last partly filled.
    a = rig.grown(1, 130);
    b = rig.grown(2, 102);  // 2.0 pages all but: the next tokens cross
    rows = rig.cache->adjacent_batch(3);
    for (int i = 0; i < 3; ++i) {
      rows->rows()[static_cast<std::size_t>(i)]->extend(Tokens(90 + i), {});
      rig.write(*rows->rows()[static_cast<std::size_t>(i)], 3 + i, 0, 90 + i);
    }
    forked = a->fork({});
  }

  bool bytes_hold() {
    bool ok = rig.holds(*a, 1, 0, a->length().value) && rig.holds(*b, 2, 0, 102) &&
              rig.holds(*forked, 1, 0, forked->length().value);
    for (int i = 0; i < 3; ++i) {
      ok = ok && rig.holds(*rows->rows()[static_cast<std::size_t>(i)], 3 + i, 0, 90 + i);
    }
    return ok;
  }

  std::string figures() const {
    const CacheFigures f = rig.cache->figures();
    std::string text;
    for (const Bytes n :
         {f.mapped, f.used, f.partial, f.ahead, f.kept, f.shared, rig.store->counts().in_use}) {
      text += std::to_string(n.value) + " ";
    }
    for (const auto* s : {&a, &b, &forked}) text += std::to_string((*s)->length().value) + " ";
    for (const auto& row : rows->rows()) text += std::to_string(row->length().value) + " ";
    return text + std::to_string(f.n_sequences);
  }

  Rig rig;
  std::shared_ptr<Sequence> a, b, forked;
  std::shared_ptr<Batch> rows;
};

struct Operation {
  const char* name;
  std::function<void(Scene&)> prepare;
  std::function<void(Scene&)> run;
};

const std::vector<Operation>& operations() {
  static const auto nothing = [](Scene&) {};
  static const std::vector<Operation> all = {
      {"extend", nothing, [](Scene& s) { s.a->extend(Tokens(200), {}); }},
      {"step across pages", nothing,
       [](Scene& s) { s.rig.cache->batch({s.a, s.b, s.forked})->step(Tokens(40), {}); }},
      {"fork", nothing, [](Scene& s) { s.a->fork({}); }},
      {"extend into a shared page", [](Scene& s) { s.forked->truncate(Tokens(20), {}); },
       [](Scene& s) { s.forked->extend(Tokens(60), {}); }},
      {"select", nothing,
       [](Scene& s) {
         const std::int32_t order[] = {2, 0, 0};
         s.rows->select(order, {});
       }},
      {"drop_before", nothing, [](Scene& s) { s.a->drop_before(Tokens(100), {}); }},
      {"a new sequence over kept pages", [](Scene& s) { s.rig.grown(9, 100)->release({}); },
       [](Scene& s) { s.rig.cache->sequence(Tokens(100)); }},
      {"another cache", nothing,
       [](Scene& s) { Cache::make(s.rig.store, s.rig.cache_options)->close(); }},
      {"create ahead", nothing, [](Scene& s) { s.rig.store->create_ahead(kTestPage * 20); }},
  };
  return all;
}

void fail_every_call(const Operation& operation, const RigOptions& options, Fault fault) {
  int failures = 0;
  for (std::uint64_t n = 1;; ++n) {
    Scene scene(options);
    operation.prepare(scene);
    const std::string before = scene.figures();
    scene.rig.backend->fail(n, fault);
    bool has_thrown = false;
    try {
      operation.run(scene);
    } catch (const OutOfMemory&) {
      has_thrown = true;
    } catch (const DriverError&) {
      has_thrown = true;
    }
    const bool has_fired = scene.rig.backend->fired();
    scene.rig.backend->fail_no_more();
    BOOST_TEST(figures_add_up(scene.rig));
    if (has_thrown) {
      ++failures;
      BOOST_TEST(scene.figures() == before);
      BOOST_TEST(scene.bytes_hold());
      operation.run(scene);  // and now it works
    }
    BOOST_TEST(scene.rig.backend->violations().empty());
    BOOST_REQUIRE(n < 200);
    if (!has_fired) break;
  }
  BOOST_TEST(failures > 0);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(faults)

BOOST_AUTO_TEST_CASE(every_operation_happens_whole_or_not_at_all) {
  for (const Operation& operation : operations()) {
    for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
      for (const std::int32_t layers_per_page : {0, 1}) {
        for (const Fault fault : {Fault::driver, Fault::out_of_memory}) {
          BOOST_TEST_CONTEXT(operation.name << ", class " << int{largest_class} << ", "
                                            << layers_per_page << " layers per page") {
            fail_every_call(operation,
                            {.n_pages = 128,
                             .largest_class = largest_class,
                             .layers_per_page = layers_per_page,
                             .max_seqs = 12,
                             .scrub = Scrub::reuse,
                             .window = Tokens(20)},
                            fault);
          }
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(what_cannot_be_undone_is_lost_and_nothing_else_is) {
  Rig rig({.n_pages = 128});
  const auto other = rig.grown(2, 200);
  auto batch = rig.cache->adjacent_batch(2);
  for (const auto& row : batch->rows()) row->extend(Tokens(120), {});
  // The map of the second row fails for good, and so does every attempt to put things back.
  rig.backend->fail(2, Fault::driver, Call::map, FaultyBackend::kEver);
  const std::int32_t order[] = {1, 0};
  BOOST_CHECK_THROW(batch->select(order, {}), DriverError);
  rig.backend->fail_no_more();
  int n_lost = 0;
  for (const auto& row : batch->rows()) {
    try {
      row->extend(Tokens(1), {});
    } catch (const DriverError& e) {
      BOOST_TEST(e.code() == "lost");
      ++n_lost;
    }
  }
  BOOST_TEST(n_lost > 0);
  BOOST_TEST(rig.holds(*other, 2, 0, 200));
  for (const auto& row : batch->rows()) row->release({});
  other->extend(Tokens(100), {});
  BOOST_TEST(rig.holds(*other, 2, 0, 200));
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

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
