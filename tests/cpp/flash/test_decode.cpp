// The decode kernel on its own, for the sanitizers; tests/flash_compat compares its numbers.
#include <boost/test/unit_test.hpp>
#include <cmath>

#include "flash/problem.hpp"
#include "kernel/decode.hpp"
#include "kernel/levels.hpp"

namespace kvspan::flash {
namespace {

BOOST_AUTO_TEST_SUITE(decode_kernel)

BOOST_AUTO_TEST_CASE(memory_is_left_at_its_end) {
  for (const Level* level : levels()) {
    for (const Element element : {Element::float32, Element::bfloat16, Element::float16}) {
      for (const int head_dim : {32, 33, 64, 80}) {
        for (const int n_threads : {1, 3}) {
          Decode d(element, {0, 1, 800, 31, 800}, 800, head_dim);
          decode(d.problem, *level, n_threads);
          const std::size_t row = d.out.size() / d.lengths.size();
          BOOST_TEST(d.out == [&] {
            std::vector<char> expected = d.queries;
            std::fill_n(expected.begin(), row, '\0');
            return expected;
          }());
          BOOST_TEST(d.lse[0] == -INFINITY);
          BOOST_TEST(std::abs(d.lse[6] - 0.125f * static_cast<float>(head_dim)) < 1e-4);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_head_dim_below_a_chunk_takes_a_narrower_level) {
  BOOST_TEST(level_for(64) == levels().front());
  BOOST_TEST(level_for(7) == nullptr);
  Decode d(Element::float32, {40}, 40, 8);
  decode(d.problem, *level_for(8), 1);
  BOOST_TEST(d.out == d.queries);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace kvspan::flash
