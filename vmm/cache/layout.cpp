#include "cache/layout.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

// Vector loads want aligned planes, and FlashAttention refuses strides that are no multiple of
// this.
constexpr std::uint64_t kPlaneAlignment = 16;

// Kernels keep offsets inside one batch row in 32 bits (DESIGN rule 10).
constexpr std::uint64_t kMaxOffset = std::uint64_t{1} << 31;

// What "typical" means for the automatic choice: a request of this length.
constexpr Tokens kTypicalLength{1024};

// What it costs, in parts of attention's time, that a layer's records do not follow each other
// without gaps: a stream of memory that breaks off loses what the processor fetched ahead of it.
// `bench/run.py layout`: with 2 or more layers a page a decode step takes 1.35 times as long where
// a record has 512 bytes, 1.2 to 1.4 at 768, 1.1 to 1.25 at 1.5 KiB, 1.13 to 1.2 at 4 KiB, 1.0
// to 1.15 at 8 KiB, whatever their number. Prefilling costs the same in all layouts.
double price_of_gaps(double record_bytes) { return 8 / std::sqrt(record_bytes); }

// Half a page a lane is unused on average.
double expected_waste(const std::vector<Lane>& lanes, Bytes page_size) {
  double live = 0;
  for (const Lane& lane : lanes) {
    live +=
        static_cast<double>(lane.payload_bytes.value) * static_cast<double>(kTypicalLength.value);
  }
  const double partial = static_cast<double>(lanes.size() * page_size.value) / 2;
  return partial / (live + partial);
}

std::string percent(double fraction) {
  char text[16];
  std::snprintf(text, sizeof text, "%.1f%%", 100 * fraction);
  return text;
}

void check(const std::vector<LayerSpec>& layers, const LayoutOptions& options) {
  if (layers.empty()) throw InvalidArgument("a cache needs at least one layer");
  if (options.max_seq_len < Tokens(1) || options.max_seq_len.value >= (std::int64_t{1} << 31)) {
    throw InvalidArgument("max_seq_len must be between 1 and 2147483647 (lengths are int32), not " +
                          std::to_string(options.max_seq_len.value));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string where = "layer " + std::to_string(i);
    if (layers[i].planes.empty()) {
      throw InvalidArgument(where + " has no planes; a layer needs at least one, such as K and V");
    }
    if (layers[i].window && *layers[i].window < Tokens(1)) {
      throw InvalidArgument(where + ": a sliding window is at least 1 token, or None for none");
    }
    for (const PlaneSpec& plane : layers[i].planes) {
      if (plane.heads < 1 || plane.dim < 1 || plane.heads > (1 << 20) || plane.dim > (1 << 20)) {
        throw InvalidArgument(where + ", plane '" + plane.name +
                              "': heads and dim must be between 1 and 1048576, not " +
                              std::to_string(plane.heads) + " and " + std::to_string(plane.dim));
      }
    }
  }
}

// The layers of one kind (same window), in order.
std::vector<std::vector<std::size_t>> kinds_of(const std::vector<LayerSpec>& layers) {
  std::vector<std::vector<std::size_t>> kinds;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto same = std::ranges::find_if(
        kinds, [&](const auto& kind) { return layers[kind.front()].window == layers[i].window; });
    if (same == kinds.end()) {
      kinds.push_back({i});
    } else {
      same->push_back(i);
    }
  }
  return kinds;
}

// What layers_per_page may be: all, or what divides the number of layers of every kind.
std::vector<std::int32_t> choices(const std::vector<LayerSpec>& layers) {
  const auto kinds = kinds_of(layers);
  std::vector<std::int32_t> result;
  const auto n = static_cast<std::int32_t>(layers.size());
  for (std::int32_t g = 1; g <= n; ++g) {
    const bool divides = std::ranges::all_of(
        kinds, [&](const auto& kind) { return kind.size() % static_cast<std::size_t>(g) == 0; });
    if (divides || g == n) result.push_back(g);
  }
  return result;
}

}  // namespace

Bytes size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return Bytes(4);
    case DType::f16:
    case DType::bf16:
      return Bytes(2);
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::i8:
      return Bytes(1);
  }
  return Bytes(0);
}

std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f8_e4m3:
      return "float8_e4m3fn";
    case DType::f8_e5m2:
      return "float8_e5m2";
    case DType::i8:
      return "int8";
  }
  return "";
}

Layout::Layout(const std::vector<LayerSpec>& layers, const LayoutOptions& options) {
  check(layers, options);
  const std::vector<std::int32_t> allowed = choices(layers);
  const std::int32_t asked = options.layers_per_page;
  if (asked != 0) {
    if (std::ranges::find(allowed, asked) == allowed.end()) {
      std::string list;
      for (const std::int32_t g : allowed) list += (list.empty() ? "" : ", ") + std::to_string(g);
      throw InvalidArgument("layers_per_page must be \"auto\" or one of " + list + ", not " +
                            std::to_string(asked));
    }
    build(layers, asked, options.split_planes);
    explanation_ = "as asked; expected waste " +
                   percent(expected_waste(lanes_, options.page_size)) + " at " +
                   std::to_string(kTypicalLength.value) + " tokens";
    if (!fits_32_bits(options.max_seq_len)) {
      offset_warning_ = "max_seq_len " + std::to_string(options.max_seq_len.value) + " with " +
                        std::to_string(asked) +
                        " layers per page puts elements of one slot beyond offset 2^31; kernels "
                        "that index with 32 bits (some Triton and FlashAttention builds) will read "
                        "the wrong place: use layers_per_page=\"auto\" or a smaller max_seq_len";
    }
    return;
  }

  struct Choice {
    std::int32_t layers_per_page = 0;
    double waste = 0, price = 0;
    // Of memory and of time, which count alike: twice as much of one is worth half of the other.
    double cost() const { return (1 + price) / (1 - waste); }
  };
  std::optional<Choice> best;
  std::int32_t too_long = 0;
  for (const std::int32_t g : allowed) {
    build(layers, g, options.split_planes);
    if (!fits_32_bits(options.max_seq_len)) {
      if (too_long == 0) too_long = g;
      continue;
    }
    const double waste = expected_waste(lanes_, options.page_size);
    const double record_bytes =
        static_cast<double>(bytes_per_token().value) / static_cast<double>(layers.size());
    const double price = g > 1 && options.gaps_cost_time ? price_of_gaps(record_bytes) : 0.0;
    const Choice choice{g, waste, price};
    if (!best || choice.cost() < best->cost()) best = choice;
  }
  if (!best) {
    // Not even one layer a page keeps the offsets short: take that, and say so.
    LayoutOptions smallest = options;
    smallest.layers_per_page = 1;
    *this = Layout(layers, smallest);
    return;
  }
  build(layers, best->layers_per_page, options.split_planes);
  explanation_ = "auto: least expected waste, " + percent(best->waste) + " at " +
                 std::to_string(kTypicalLength.value) + " tokens in pages of " +
                 to_string(options.page_size);
  if (options.gaps_cost_time) {
    explanation_ += ", and time, " + percent(best->price) + " of attention's for reading with gaps";
  }
  if (too_long != 0) {
    explanation_ += "; " + std::to_string(too_long) +
                    " layers per page would put offsets in a slot beyond 2^31";
  }
}

void Layout::build(const std::vector<LayerSpec>& layers, std::int32_t layers_per_page,
                   bool split_planes) {
  lanes_.clear();
  layers_.assign(layers.size(), {});
  layers_per_page_ = layers_per_page;

  const auto place = [&](std::size_t lane_index, const PlaneSpec& spec) {
    Lane& lane = lanes_[lane_index];
    if (lane.payload_bytes == Bytes(0)) lane.dtype = spec.dtype;
    lane.is_uniform = lane.is_uniform && lane.dtype == spec.dtype;
    const Bytes size = size_of(spec.dtype) * static_cast<std::uint64_t>(spec.heads * spec.dim);
    const Plane plane{spec, lane_index, lane.token_bytes};
    lane.token_bytes += Bytes(round_up(size.value, kPlaneAlignment));
    lane.payload_bytes += size;
    return plane;
  };

  for (const auto& kind : kinds_of(layers)) {
    const auto g = static_cast<std::size_t>(layers_per_page);
    for (std::size_t begin = 0; begin < kind.size(); begin += g) {
      const std::size_t end = std::min(begin + g, kind.size());
      const std::size_t first_lane = lanes_.size();
      for (std::size_t i = begin; i < end; ++i) {
        const LayerSpec& layer = layers[kind[i]];
        for (std::size_t p = 0; p < layer.planes.size(); ++p) {
          const std::size_t lane = first_lane + (split_planes ? p : 0);
          if (lane == lanes_.size()) lanes_.push_back({.window = layer.window});
          layers_[kind[i]].push_back(place(lane, layer.planes[p]));
        }
      }
    }
  }
}

bool Layout::fits_32_bits(Tokens max_seq_len) const {
  for (const auto& planes : layers_) {
    for (const Plane& plane : planes) {
      const std::uint64_t stride =
          lanes_[plane.lane].token_bytes.value / size_of(plane.spec.dtype).value;
      if (stride * static_cast<std::uint64_t>(max_seq_len.value) > kMaxOffset) return false;
    }
  }
  return true;
}

Bytes Layout::bytes_per_token() const {
  Bytes total{};
  for (const Lane& lane : lanes_) total += lane.payload_bytes;
  return total;
}

bool Layout::has_window() const {
  return std::ranges::any_of(lanes_, [](const Lane& lane) { return lane.window.has_value(); });
}

}  // namespace kvspan
