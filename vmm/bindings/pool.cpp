#include <pybind11/stl.h>

#include <bit>
#include <optional>
#include <string>

#include "backend/cuda_backend.hpp"
#include "backend/host_backend.hpp"
#include "bindings/bindings.hpp"
#include "bindings/figures.hpp"
#include "bindings/without_gil.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "span/frame_store.hpp"

namespace py = pybind11;

namespace kvspan {

Figures calls_dict(const CallCounters& counters) {
  Figures result;
  for (std::size_t i = 0; i < kCalls; ++i) {
    const CallCount count = counters.of(static_cast<Call>(i));
    result[py::str(kCallNames[i].data(), kCallNames[i].size())] =
        py::make_tuple(count.calls, count.handles);
  }
  return result;
}

namespace {

SizeClass class_of(std::uint64_t frame_size, std::uint64_t page_size) {
  const bool is_multiple = page_size > 0 && frame_size % page_size == 0 && frame_size > 0;
  if (!is_multiple || !std::has_single_bit(frame_size / page_size) ||
      frame_size / page_size > (1u << 10)) {
    throw InvalidArgument("max_frame_size must be 1, 2, 4, ... 1024 times the page size (" +
                          to_string(Bytes(page_size)) + "), not " + to_string(Bytes(frame_size)));
  }
  return SizeClass(static_cast<std::uint8_t>(std::countr_zero(frame_size / page_size)));
}

std::shared_ptr<FrameStore> make_host_pool(std::uint64_t capacity, std::uint64_t page_size,
                                           std::uint64_t max_frame_size,
                                           const std::string& huge_pages,
                                           std::optional<std::uint32_t> numa_node,
                                           std::uint64_t reserve, std::uint64_t ready) {
  Hugetlb hugetlb = Hugetlb::never;
  if (huge_pages == "hugetlb") hugetlb = Hugetlb::always;
  if (huge_pages == "auto") hugetlb = Hugetlb::if_free;
  // Without a wish, as large as the backend has use for; on the host that is one page.
  const SizeClass largest =
      max_frame_size == 0 ? SizeClass(0) : class_of(max_frame_size, page_size);
  std::optional<NumaNode> node;
  if (numa_node) node = NumaNode(*numa_node);
  return std::make_shared<FrameStore>(make_host_backend({.page_size = Bytes(page_size),
                                                         .capacity = Bytes(capacity),
                                                         .largest_class = largest,
                                                         .huge_pages = huge_pages != "none",
                                                         .hugetlb = hugetlb,
                                                         .numa_node = node,
                                                         .reserve = Bytes(reserve)}),
                                      Bytes(capacity), largest, Bytes(ready));
}

// Without a wish: 128 MiB, but no more than an eighth of the capacity, for frames of a class that
// has no use are of no use to the others.
SizeClass largest_cuda_class(std::uint64_t capacity, std::uint64_t page_size) {
  constexpr std::uint64_t kUsual = 128ull << 20;
  SizeClass c{};
  while (c.value < FrameId::kMaxClass) {
    const std::uint64_t next = page_size << (c.value + 1);
    if (next > kUsual || next > capacity / 8) break;
    ++c.value;
  }
  return c;
}

std::shared_ptr<FrameStore> make_cuda_pool(int ordinal, std::uint64_t capacity,
                                           std::uint64_t page_size, std::uint64_t max_frame_size,
                                           std::vector<int> peers, bool shareable,
                                           std::uint64_t reserve, std::uint64_t ready) {
  const SizeClass largest = max_frame_size == 0 ? largest_cuda_class(capacity, page_size)
                                                : class_of(max_frame_size, page_size);
  CudaOptions options{.ordinal = ordinal,
                      .page_size = Bytes(page_size),
                      .capacity = Bytes(capacity),
                      .largest_class = largest,
                      .peers = std::move(peers),
                      .is_shareable = shareable};
  if (reserve != 0) options.reserve = Bytes(reserve);
  return std::make_shared<FrameStore>(make_cuda_backend(options), Bytes(capacity), largest,
                                      Bytes(ready));
}

void check_usable(const FrameStore& store) {
  if (!store.backend().usable()) {
    throw ReleasedError(
        "this process is a fork(2) child: the pool stays with the parent; make a new one here");
  }
}

Figures figures(FrameStore& store) {
  check_usable(store);
  const FrameStore::Counts counts = store.counts();
  const HugePages huge = store.backend().huge_pages();
  Figures d;
  d["capacity_bytes"] = counts.capacity.value;
  d["in_use_bytes"] = counts.in_use.value;
  d["created_bytes"] = counts.created.value;
  d["huge_bytes"] = huge.huge.value;
  d["small_bytes"] = huge.small.value;
  d["huge_refusal"] = huge.refusal;
  d["hugetlb_bytes"] = huge.hugetlb.value;
  d["n_failures"] = store.backend().failure_count();
  d["n_mappings"] = store.backend().mappings();
  d["calls"] = calls_dict(store.backend().calls());
  return d;
}

}  // namespace

void bind_pool(py::module_& m) {
  using Release = py::call_guard<WithoutGil>;
  py::class_<FrameStore, std::shared_ptr<FrameStore>>(m, "PoolHandle")
      .def_property_readonly("device",
                             [](const FrameStore& s) { return s.backend().traits().device; })
      .def_property_readonly("page_size", [](const FrameStore& s) { return s.page_size().value; })
      .def("figures", &figures)
      .def(
          "create_ahead",
          [](FrameStore& s, std::uint64_t size) {
            check_usable(s);
            s.create_ahead(Bytes(size));
          },
          py::arg("size"), Release())
      .def(
          "start_background", [](FrameStore& s) { s.background().start(); }, Release())
      .def(
          "stop_background",
          [](FrameStore& s) {
            if (s.backend().usable()) s.background().stop();
          },
          Release())
      .def(
          "work_ahead", [](FrameStore& s) { return s.background().turn().n_frames; }, Release())
      .def(
          "trim",
          [](FrameStore& s) {
            check_usable(s);
            return s.trim().value;
          },
          Release());
  m.def("make_host_pool", &make_host_pool, py::arg("capacity"), py::arg("page_size"),
        py::arg("max_frame_size"), py::arg("huge_pages"), py::arg("numa_node"), py::arg("reserve"),
        py::arg("ready"), Release());
  m.def("make_cuda_pool", &make_cuda_pool, py::arg("ordinal"), py::arg("capacity"),
        py::arg("page_size"), py::arg("max_frame_size"), py::arg("peers"), py::arg("shareable"),
        py::arg("reserve"), py::arg("ready"), Release());
}

}  // namespace kvspan
