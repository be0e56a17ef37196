// How layers become lanes: sizes, divisors, kinds of layers, and what the automatic choice weighs.
#include <boost/test/unit_test.hpp>

#include "cache/layout.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {
namespace {

LayerSpec layer(std::int64_t heads, std::int64_t dim, DType dtype,
                std::optional<Tokens> window = {}) {
  return {{{"k", dtype, heads, dim}, {"v", dtype, heads, dim}}, window};
}

const std::vector<LayerSpec> kLlama(32, layer(8, 128, DType::bf16));

LayoutOptions options(std::int32_t layers_per_page = 0, std::int64_t max_seq_len = 16384) {
  return {Tokens(max_seq_len), kMiB * 2, layers_per_page};
}

}  // namespace

BOOST_AUTO_TEST_SUITE(layout)

BOOST_AUTO_TEST_CASE(layers_share_lanes_by_the_divisor) {
  for (const std::int32_t g : {1, 2, 4, 8, 16, 32}) {
    const Layout layout(kLlama, options(g));
    BOOST_TEST(layout.lanes().size() == static_cast<std::size_t>(32 / g));
    BOOST_TEST((layout.lanes().front().token_bytes == kKiB * static_cast<std::uint64_t>(4 * g)));
    BOOST_TEST((layout.bytes_per_token() == kKiB * 128));
  }
  BOOST_CHECK_THROW(Layout(kLlama, options(3)), InvalidArgument);
  BOOST_CHECK_THROW(Layout(kLlama, options(-1)), InvalidArgument);
}

BOOST_AUTO_TEST_CASE(planes_lie_side_by_side_and_aligned) {
  const std::vector<LayerSpec> layers(
      2, {{{"k", DType::i8, 3, 5}, {"scale", DType::f32, 3, 1}, {"latent", DType::bf16, 1, 576}}});
  const Layout layout(layers, options(2));
  std::uint64_t end = 0;
  for (const auto& planes : layout.layers()) {
    for (const Plane& plane : planes) {
      BOOST_TEST(plane.offset.value % 16 == 0u);
      BOOST_TEST(plane.offset.value >= end);
      const PlaneSpec& spec = plane.spec;
      end = plane.offset.value +
            size_of(spec.dtype).value * static_cast<std::uint64_t>(spec.heads * spec.dim);
    }
  }
  BOOST_TEST((layout.lanes().front().token_bytes >= Bytes(end)));
  BOOST_TEST((layout.bytes_per_token() == Bytes(2 * (15 + 12 + 1152))));
  BOOST_TEST(!layout.lanes().front().is_uniform);
}

BOOST_AUTO_TEST_CASE(split_planes_have_lanes_of_their_own) {
  LayoutOptions split = options(4);
  split.split_planes = true;
  const Layout layout(kLlama, split);
  BOOST_TEST(layout.lanes().size() == 16u);
  for (const auto& planes : layout.layers()) BOOST_TEST(planes[0].lane != planes[1].lane);
}

BOOST_AUTO_TEST_CASE(layers_with_another_window_have_lanes_of_their_own) {
  std::vector<LayerSpec> hybrid;
  for (int i = 0; i < 12; ++i) {
    const bool is_full = i % 3 == 2;
    hybrid.push_back(layer(4, 64, DType::f16, is_full ? std::nullopt : std::optional(Tokens(512))));
  }
  const Layout layout(hybrid, options());
  BOOST_TEST(layout.has_window());
  for (std::size_t i = 0; i < hybrid.size(); ++i) {
    const Lane& lane = layout.lanes()[layout.layers()[i].front().lane];
    BOOST_TEST((lane.window == hybrid[i].window));
  }
  BOOST_CHECK_THROW(Layout(hybrid, options(3)), InvalidArgument);  // divides 12, not 8
  BOOST_TEST(Layout(hybrid, options(4)).lanes().size() == 3u);     // 8 / 4 + 4 / 4
}

BOOST_AUTO_TEST_CASE(the_automatic_choice_wastes_least_within_32_bits) {
  BOOST_TEST(Layout(kLlama, options()).layers_per_page() == 32);
  // 131,072 positions of 8 layers are 2^31 elements; of 16 they would be too many.
  const Layout longer(kLlama, options(0, 131072));
  BOOST_TEST(longer.layers_per_page() == 8);
  BOOST_TEST(longer.explanation().find("2^31") != std::string::npos);
  BOOST_TEST(longer.offset_warning().empty());
  BOOST_TEST(!Layout(kLlama, options(16, 131072)).offset_warning().empty());
  // Where nothing is short enough, one layer a page, and a warning.
  BOOST_TEST(!Layout(kLlama, options(0, 2'000'000)).offset_warning().empty());
}

BOOST_AUTO_TEST_CASE(the_automatic_choice_weighs_gaps_where_they_cost_time) {
  const std::vector<LayerSpec> long_records(32, layer(32, 128, DType::f32));
  LayoutOptions weighed = options(0, 4096);
  weighed.gaps_cost_time = true;
  // 32 KiB a token: a layer's pages fill soon, and memory is not worth the time.
  BOOST_TEST(Layout(long_records, options(0, 4096)).layers_per_page() == 32);
  const Layout one(long_records, weighed);
  BOOST_TEST(one.layers_per_page() == 1);
  BOOST_TEST(one.explanation().find("time, 0.0%") != std::string::npos);
  // 4 KiB a token: it is.
  const Layout all(kLlama, weighed);
  BOOST_TEST(all.layers_per_page() == 32);
  BOOST_TEST(all.explanation().find("time, 12.5%") != std::string::npos);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
