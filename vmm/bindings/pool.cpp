#include <pybind11/stl.h>

#include <bit>
#include <string>

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
                                           std::uint64_t max_frame_size, bool huge_pages,
                                           std::uint64_t reserve) {
  // Without a wish, as large as the backend has use for; on the host that is one page.
  const SizeClass largest =
      max_frame_size == 0 ? SizeClass(0) : class_of(max_frame_size, page_size);
  return std::make_shared<FrameStore>(make_host_backend({.page_size = Bytes(page_size),
                                                         .capacity = Bytes(capacity),
                                                         .largest_class = largest,
                                                         .huge_pages = huge_pages,
                                                         .reserve = Bytes(reserve)}),
                                      Bytes(capacity), largest);
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
  d["n_failures"] = store.backend().failure_count();
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
          "trim",
          [](FrameStore& s) {
            check_usable(s);
            return s.trim().value;
          },
          Release());
  m.def("make_host_pool", &make_host_pool, py::arg("capacity"), py::arg("page_size"),
        py::arg("max_frame_size"), py::arg("huge_pages"), py::arg("reserve"), Release());
}

}  // namespace kvspan
