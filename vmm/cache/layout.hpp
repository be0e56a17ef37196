// How tokens fill pages. Layers are gathered into lanes: a lane is one reservation in which, for
// each position of each slot, the planes of all its layers lie side by side (a record). A kernel
// sees each plane as an ordinary strided tensor [slots, positions, heads, dim]; records may
// straddle pages, for the range is contiguous.
//
// `layers_per_page` says how many layers share a lane. Many: fewer, fuller pages, one mapping for
// all of them, but a longer stride between positions. The automatic choice weighs the expected
// waste against the stride's measured price and is explained in `explanation`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/ids.hpp"

namespace kvspan {

enum class DType : std::uint8_t { f32, f16, bf16, f8_e4m3, f8_e5m2, i8 };

Bytes size_of(DType dtype);
std::string_view name_of(DType dtype);

// One tensor of a layer: K, V, the scales of a quantized cache, an MLA latent.
struct PlaneSpec {
  std::string name;
  DType dtype;
  std::int64_t heads;
  std::int64_t dim;

  bool operator==(const PlaneSpec&) const = default;
};

struct LayerSpec {
  std::vector<PlaneSpec> planes;
  std::optional<Tokens> window{};  // attends to this many last tokens; none: to all

  bool operator==(const LayerSpec&) const = default;
};

struct LayoutOptions {
  Tokens max_seq_len;
  Bytes page_size;
  std::int32_t layers_per_page = 0;  // 0: automatic
  bool split_planes = false;         // each plane in a lane of its own, as K and V in vAttention
  bool gaps_cost_time = false;       // whether kernels were measured to read slower across gaps
};

// Where a plane is found in its lane.
struct Plane {
  PlaneSpec spec;
  std::size_t lane;
  Bytes offset;  // in the record
};

struct Lane {
  Bytes token_bytes{};    // the record's size: what one token takes, padding included
  Bytes payload_bytes{};  // without the padding
  std::optional<Tokens> window;
  bool is_uniform = true;  // one dtype: stale bytes of this lane are values of that dtype
  DType dtype{};
};

class Layout {
 public:
  // Throws InvalidArgument.
  Layout(const std::vector<LayerSpec>& layers, const LayoutOptions& options);

  const std::vector<Lane>& lanes() const { return lanes_; }
  const std::vector<std::vector<Plane>>& layers() const { return layers_; }  // planes, by layer
  std::int32_t layers_per_page() const { return layers_per_page_; }

  Bytes bytes_per_token() const;  // payload, all layers
  const std::string& explanation() const { return explanation_; }
  // Planes whose largest element offset in one slot does not fit in 32 bits; empty if there is
  // none.
  const std::string& offset_warning() const { return offset_warning_; }
  bool has_window() const;

 private:
  void build(const std::vector<LayerSpec>& layers, std::int32_t layers_per_page, bool split_planes);
  bool fits_32_bits(Tokens max_seq_len) const;

  std::vector<Lane> lanes_;
  std::vector<std::vector<Plane>> layers_;
  std::int32_t layers_per_page_ = 0;
  std::string explanation_;
  std::string offset_warning_;
};

}  // namespace kvspan
