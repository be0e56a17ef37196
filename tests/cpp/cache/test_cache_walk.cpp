// A random walk over everything a cache does, on one thread and seeded: after every operation the
// figures add up, and every sequence holds the tokens it was written. Modelled on a serving loop in
// a pool too small for it, so that pages are reclaimed all the time.
#include <boost/test/unit_test.hpp>
#include <random>

#include "cache/rig.hpp"

namespace kvspan::test {
namespace {

// A sequence, and what was written where: marks[i] is the mark of token i.
struct Known {
  std::shared_ptr<Sequence> sequence;
  std::vector<std::int32_t> marks;
};

bool holds(Rig& rig, const Known& known) {
  std::int64_t i = known.sequence->dropped().value;
  const auto n = static_cast<std::int64_t>(known.marks.size());
  while (i < n) {
    const std::int32_t mark = known.marks[static_cast<std::size_t>(i)];
    std::int64_t end = i;
    while (end < n && known.marks[static_cast<std::size_t>(end)] == mark) ++end;
    if (!rig.holds(*known.sequence, mark, i, end)) return false;
    i = end;
  }
  return known.sequence->length().value == n;
}

void walk(const RigOptions& options, Tokens overread, std::uint32_t seed) {
  Rig rig(options);
  rig.cache_options.overread = overread;
  rig.cache->close();
  rig.cache = Cache::make(rig.store, rig.cache_options);
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<unsigned>(n));
  };
  std::vector<Known> all;
  std::int32_t mark = 0;
  for (int i = 0; i < 250; ++i) {
    ++mark;
    try {
      if (all.empty() || below(6) == 0) {
        all.push_back({rig.cache->sequence(Tokens(below(200))), {}});
        continue;
      }
      Known& known = all[static_cast<std::size_t>(below(static_cast<std::int64_t>(all.size())))];
      const auto length = static_cast<std::int64_t>(known.marks.size());
      const std::int64_t dropped = known.sequence->dropped().value;
      switch (below(7)) {
        case 0:
        case 1: {
          const std::int64_t n = 1 + below(150);
          known.sequence->extend(Tokens(n), {});
          rig.write(*known.sequence, mark, length, length + n);
          known.marks.resize(known.marks.size() + static_cast<std::size_t>(n), mark);
          break;
        }
        case 2: {
          const std::int64_t n = dropped + below(length - dropped + 1);
          known.sequence->truncate(Tokens(n), {});
          known.marks.resize(static_cast<std::size_t>(n));
          break;
        }
        case 3: {
          auto child = known.sequence->fork(1, {}, {}).front();
          all.push_back({std::move(child), std::vector(known.marks)});
          break;
        }
        case 4:
          known.sequence->release({});
          std::swap(known, all.back());
          all.pop_back();
          break;
        case 5:
          if (options.window) {
            known.sequence->drop_before(
                Tokens(below(std::max(length + 2 - options.window->value, std::int64_t{1}))), {});
          }
          break;
        default:
          if (below(2) == 0) rig.cache->trim();
          rig.store->trim();
      }
    } catch (const OutOfMemory&) {
      all.pop_back();
    } catch (const CapacityError&) {
      all.pop_back();
    }
    BOOST_REQUIRE(figures_add_up(rig));
    BOOST_REQUIRE(rig.cache->page_map().size() * kTestPage.value ==
                  rig.cache->figures().mapped.value);
    BOOST_REQUIRE(rig.windows_read_as_zeros());
    for (const Known& known : all) BOOST_REQUIRE(holds(rig, known));
  }
  BOOST_TEST(rig.backend->violations().empty());
  all.clear();
  rig.cache->trim();
  BOOST_TEST((rig.store->counts().in_use == rig.cache->figures().zeros));
  BOOST_TEST(rig.windows_read_as_zeros());
  rig.cache->close();
  BOOST_TEST((rig.store->counts().in_use == Bytes(0)));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cache_walk)

BOOST_AUTO_TEST_CASE(figures_and_bytes_are_right_after_every_operation) {
  std::uint32_t seed = 0;
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    for (const std::int32_t layers_per_page : {1, 2}) {
      for (const auto& window : {std::optional<Tokens>(), std::optional(Tokens(20))}) {
        for (const Tokens overread : {Tokens(0), Tokens(64)}) {
          for (const auto& keep : {std::optional<Bytes>(), std::optional(kGiB)}) {
            BOOST_TEST_CONTEXT("class " << int{largest_class} << ", " << layers_per_page
                                        << " layers per page, overread " << overread.value
                                        << ", seed " << seed) {
              walk({.n_pages = 60,
                    .largest_class = largest_class,
                    .layers_per_page = layers_per_page,
                    .keep = keep,
                    .window = window},
                   overread, seed++);
            }
          }
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(windows_read_as_zeros_after_every_operation) {
  std::uint32_t seed = 100;
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{3}}) {
    for (const std::int32_t layers_per_page : {1, 2}) {
      for (const Tokens static_len : {Tokens(30), Tokens(400), Tokens(1000)}) {
        BOOST_TEST_CONTEXT("class " << int{largest_class} << ", " << layers_per_page
                                    << " layers per page, static_len " << static_len.value
                                    << ", seed " << seed) {
          walk({.n_pages = 70,
                .largest_class = largest_class,
                .layers_per_page = layers_per_page,
                .window = seed % 2 == 0 ? std::optional<Tokens>() : std::optional(Tokens(20)),
                .static_len = static_len},
               Tokens(0), seed);
          ++seed;
        }
      }
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
