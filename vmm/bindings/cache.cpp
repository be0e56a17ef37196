#include "cache/cache.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "bindings/bindings.hpp"
#include "bindings/figures.hpp"
#include "bindings/tensor_view.hpp"
#include "bindings/without_gil.hpp"
#include "cache/batch.hpp"
#include "core/errors.hpp"

namespace py = pybind11;

namespace kvspan {

namespace {

using Release = py::call_guard<WithoutGil>;
using PlaneTuple = std::tuple<std::string, std::string, std::int64_t, std::int64_t>;
using LayerTuple = std::pair<std::vector<PlaneTuple>, std::optional<std::int64_t>>;

constexpr std::array kDTypes = {DType::f32,     DType::f16,     DType::bf16,
                                DType::f8_e4m3, DType::f8_e5m2, DType::i8};

DType dtype_of(const std::string& name) {
  const auto found = std::ranges::find(kDTypes, name, &name_of);
  if (found != kDTypes.end()) return *found;
  throw InvalidArgument("unknown dtype " + name);
}

dlpack::DataType dlpack_of(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype).value);
  switch (dtype) {
    case DType::f32:
    case DType::f16:
      return {dlpack::kFloat, bits, 1};
    case DType::bf16:
      return {dlpack::kBfloat, bits, 1};
    case DType::f8_e4m3:
      return {dlpack::kFloat8E4M3Fn, bits, 1};
    case DType::f8_e5m2:
      return {dlpack::kFloat8E5M2, bits, 1};
    case DType::i8:
      break;
  }
  return {dlpack::kInt, bits, 1};
}

std::shared_ptr<Cache> make_cache(std::shared_ptr<FrameStore> store,
                                  const std::vector<LayerTuple>& layers, std::int32_t max_seqs,
                                  std::int64_t max_seq_len, std::int32_t layers_per_page,
                                  bool split_planes, std::optional<std::int64_t> overread_tokens,
                                  bool zero_unmapped, std::optional<std::int64_t> static_len,
                                  bool scrub_reuse, std::optional<std::uint64_t> keep) {
  CacheOptions options;
  for (const auto& [planes, window] : layers) {
    LayerSpec& layer = options.layers.emplace_back();
    if (window) layer.window = Tokens(*window);
    for (const auto& [name, dtype, heads, dim] : planes) {
      layer.planes.push_back({name, dtype_of(dtype), heads, dim});
    }
  }
  options.max_seqs = max_seqs;
  options.max_seq_len = Tokens(max_seq_len);
  options.layers_per_page = layers_per_page;
  options.split_planes = split_planes;
  if (overread_tokens) options.overread = Tokens(*overread_tokens);
  options.unmapped = zero_unmapped ? Unmapped::zero : Unmapped::fault;
  if (static_len) options.static_len = Tokens(*static_len);
  options.scrub = scrub_reuse ? Scrub::reuse : Scrub::cross;
  if (keep) options.keep = Bytes(*keep);
  return Cache::make(std::move(store), options);
}

TensorView plane_view(const Cache& cache, std::size_t layer, std::size_t plane_index) {
  const std::shared_ptr<Space> space = cache.space();
  const Plane& plane = space->layout().layers().at(layer).at(plane_index);
  const auto item = size_of(plane.spec.dtype).value;
  const auto in_elements = [&](Bytes n) { return static_cast<std::int64_t>(n.value / item); };
  return {
      .owner = space,
      .data = space->lane_base(plane.lane) + plane.offset,
      .dtype = dlpack_of(plane.spec.dtype),
      .device = dlpack_device(space->store().backend().traits()),
      .shape = {space->options().n_slots, space->options().max_seq_len.value, plane.spec.heads,
                plane.spec.dim},
      .strides = {in_elements(space->slot_bytes(plane.lane)),
                  in_elements(space->layout().lanes()[plane.lane].token_bytes), plane.spec.dim, 1}};
}

Figures layout_dict(const Cache& cache) {
  const std::shared_ptr<Space> space = cache.space();
  const Layout& layout = space->layout();
  std::vector<std::uint64_t> token_bytes;
  for (const Lane& lane : layout.lanes()) token_bytes.push_back(lane.token_bytes.value);
  Figures d;
  d["layers_per_page"] = layout.layers_per_page();
  d["lane_token_bytes"] = token_bytes;
  d["bytes_per_token"] = layout.bytes_per_token().value;
  d["explanation"] = layout.explanation();
  d["offset_warning"] = layout.offset_warning();
  d["overread_tokens"] = space->options().overread.value;
  return d;
}

Figures figures(const Cache& cache) {
  const CacheFigures f = cache.figures();
  Figures d;
  d["reserved_bytes"] = f.reserved.value;
  d["mapped_bytes"] = f.mapped.value;
  d["used_bytes"] = f.used.value;
  d["zero_bytes"] = f.zeros.value;
  d["partial_bytes"] = f.partial.value;
  d["ahead_bytes"] = f.ahead.value;
  d["kept_bytes"] = f.kept.value;
  d["shared_bytes"] = f.shared.value;
  d["prefix_bytes"] = f.prefix.value;
  d["merged_bytes"] = f.merged.value;
  d["n_sequences"] = f.n_sequences;
  d["n_slots"] = f.n_slots;
  d["n_grown_late"] = f.n_grown_late;
  Figures prefixes;
  prefixes["n_hits"] = f.prefixes.n_hits;
  prefixes["n_misses"] = f.prefixes.n_misses;
  prefixes["n_hit_tokens"] = f.prefixes.n_hit_tokens;
  prefixes["n_published"] = f.prefixes.n_published;
  prefixes["n_evicted"] = f.prefixes.n_evicted;
  d["prefixes"] = prefixes;
  d["calls"] = calls_dict(cache.calls());
  return d;
}

using PageTuple =
    std::tuple<std::int32_t, std::size_t, std::uint32_t, std::uint32_t, std::uint32_t>;

std::vector<PageTuple> page_map(const Cache& cache) {
  std::vector<PageTuple> result;
  for (const MappedPage& p : cache.page_map()) {
    result.emplace_back(p.slot.value, p.lane, p.page.value, p.frame.value, p.references);
  }
  return result;
}

const char* name_of(MapperEvent::Kind kind) {
  switch (kind) {
    case MapperEvent::Kind::mapped:
      return "mapped";
    case MapperEvent::Kind::late:
      return "late";
    case MapperEvent::Kind::unmapped:
      return "unmapped";
    case MapperEvent::Kind::starved:
      return "starved";
    case MapperEvent::Kind::failed:
      return "failed";
  }
  return "";
}

using EventTuple = std::tuple<double, const char*, std::int32_t, std::uint32_t, std::int64_t>;

std::vector<EventTuple> mapper_events(const Cache& cache) {
  std::vector<EventTuple> result;
  for (const MapperEvent& e : cache.mapper_events()) {
    const std::chrono::duration<double> at = e.at.time_since_epoch();
    result.emplace_back(at.count(), name_of(e.kind), e.slot.value, e.pages.value, e.room.value);
  }
  return result;
}

// An int32 array of a batch, as far as the batch has rows now.
TensorView array_view(const Batch& batch, BatchArrays::Which which) {
  return {.owner = batch.arrays(),
          .data = batch.arrays()->device(which),
          .dtype = {dlpack::kInt, 32, 1},
          .device = dlpack_device(batch.arrays()->traits()),
          .shape = {static_cast<std::int64_t>(batch.size())},
          .strides = {1}};
}

// A stream as Python hands it over: the driver's handle.
Stream to_stream(std::uintptr_t handle) { return {handle}; }

// Token ids, int32, as Python hands them over: their address.
std::span<const std::int32_t> tokens_at(std::uintptr_t address, std::size_t n) {
  return {reinterpret_cast<const std::int32_t*>(address), n};
}

void bind_sequence(py::module_& m) {
  const auto stream = py::arg("stream") = 0;
  py::class_<Sequence, std::shared_ptr<Sequence>>(m, "SequenceHandle")
      .def(
          "extend",
          [](Sequence& s, std::int64_t n, std::uintptr_t on) {
            s.extend(Tokens(n), to_stream(on));
          },
          py::arg("n_tokens"), stream, Release())
      .def(
          "truncate",
          [](Sequence& s, std::int64_t n, std::uintptr_t on) {
            s.truncate(Tokens(n), to_stream(on));
          },
          py::arg("length"), stream, Release())
      .def(
          "drop_before",
          [](Sequence& s, std::int64_t p, std::uintptr_t on) {
            s.drop_before(Tokens(p), to_stream(on));
          },
          py::arg("position"), stream, Release())
      .def(
          "fork",
          [](Sequence& s, std::int32_t n, std::optional<std::int64_t> length, std::uintptr_t on) {
            std::optional<Tokens> at;
            if (length) at = Tokens(*length);
            return s.fork(n, at, to_stream(on));
          },
          py::arg("n"), py::arg("length"), stream, Release())
      .def(
          "commit",
          [](Sequence& s, std::uintptr_t tokens, std::size_t n, bool merges, std::uintptr_t on) {
            return s.publish(tokens_at(tokens, n), merges, to_stream(on)).value;
          },
          py::arg("tokens"), py::arg("n_tokens"), py::arg("merges"), stream, Release())
      .def(
          "release", [](Sequence& s, std::uintptr_t on) { s.release(to_stream(on)); }, stream,
          Release())
      .def_property_readonly("length", [](const Sequence& s) { return s.length().value; })
      .def_property_readonly("dropped", [](const Sequence& s) { return s.dropped().value; })
      .def_property_readonly("slot", [](const Sequence& s) { return s.slot().value; })
      .def_property_readonly("is_released", &Sequence::is_released);
}

void bind_batch(py::module_& m) {
  const auto stream = py::arg("stream") = 0;
  using Which = BatchArrays::Which;
  py::class_<Batch, std::shared_ptr<Batch>>(m, "BatchHandle")
      .def(
          "step",
          [](Batch& b, std::int64_t n, std::uintptr_t on) { b.step(Tokens(n), to_stream(on)); },
          py::arg("n_tokens"), stream, Release())
      .def(
          "select",
          [](Batch& b, const std::vector<std::int32_t>& rows, std::uintptr_t on) {
            b.select(rows, to_stream(on));
          },
          py::arg("rows"), stream, Release())
      .def(
          "fork", [](Batch& b, std::uintptr_t on) { return b.fork(to_stream(on)); }, stream,
          Release())
      .def(
          "refresh", [](Batch& b, std::uintptr_t on) { b.refresh(to_stream(on)); }, stream,
          Release())
      .def_property_readonly("size", &Batch::size)
      .def_property_readonly("rows", &Batch::rows)
      .def_property_readonly("first_slot",
                             [](const Batch& b) -> std::optional<std::int32_t> {
                               if (!b.lease()) return std::nullopt;
                               return b.lease()->first.value;
                             })
      .def("before_view", [](const Batch& b) { return array_view(b, Which::before); })
      .def("lengths_view", [](const Batch& b) { return array_view(b, Which::lengths); })
      .def("slots_view", [](const Batch& b) { return array_view(b, Which::slots); });
}

}  // namespace

void bind_cache(py::module_& m) {
  bind_sequence(m);
  bind_batch(m);
  const auto stream = py::arg("stream") = 0;
  py::class_<Cache, std::shared_ptr<Cache>>(m, "CacheHandle")
      .def(
          "sequence",
          [](Cache& c, std::int64_t n, std::uintptr_t on) {
            return c.sequence(Tokens(n), to_stream(on));
          },
          py::arg("n_tokens"), stream, Release())
      .def(
          "sequence_of",
          [](Cache& c, std::uintptr_t tokens, std::size_t n, std::string salt,
             std::int64_t expected, std::uintptr_t on) {
            return c.sequence(tokens_at(tokens, n), std::move(salt), Tokens(expected),
                              to_stream(on));
          },
          py::arg("tokens"), py::arg("n_tokens"), py::arg("salt"), py::arg("expected"), stream,
          Release())
      .def(
          "reorder",
          [](Cache& c, const std::vector<std::shared_ptr<Sequence>>& sequences,
             const std::vector<std::int32_t>& parents,
             std::uintptr_t on) { c.reorder(sequences, parents, to_stream(on)); },
          py::arg("sequences"), py::arg("parents"), stream, Release())
      .def(
          "batch",
          [](Cache& c, std::vector<std::shared_ptr<Sequence>> sequences, std::uintptr_t on) {
            return c.batch(std::move(sequences), to_stream(on));
          },
          py::arg("sequences"), stream, Release())
      .def(
          "adjacent_batch",
          [](Cache& c, std::int32_t n, std::uintptr_t on) {
            return c.adjacent_batch(n, to_stream(on));
          },
          py::arg("n"), stream, Release())
      .def(
          "trim", [](Cache& c) { return c.trim().value; }, Release())
      .def("close", &Cache::close, Release())
      .def("plane_view", &plane_view, py::arg("layer"), py::arg("plane"))
      .def("layout", &layout_dict)
      .def("figures", &figures)
      .def("page_map", &page_map, Release())
      .def("mapper_events", &mapper_events, Release())
      .def("lengths", [](const Cache& c) {
        std::vector<std::int64_t> lengths;
        for (const Tokens n : c.lengths()) lengths.push_back(n.value);
        return lengths;
      });
  m.def("make_cache", &make_cache, py::arg("store"), py::arg("layers"), py::arg("max_seqs"),
        py::arg("max_seq_len"), py::arg("layers_per_page"), py::arg("split_planes"),
        py::arg("overread_tokens"), py::arg("zero_unmapped"), py::arg("static_len"),
        py::arg("scrub_reuse"), py::arg("keep"), Release());
}

}  // namespace kvspan
