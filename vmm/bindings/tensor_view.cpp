#include "bindings/tensor_view.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvspan {

namespace {

template <class Managed>
struct Abi;

template <>
struct Abi<dlpack::ManagedTensor> {
  static constexpr const char* kName = "dltensor";
};

template <>
struct Abi<dlpack::ManagedTensorVersioned> {
  static constexpr const char* kName = "dltensor_versioned";
};

// The exported tensor and what it needs, in one allocation that its deleter frees.
template <class Managed>
struct Export {
  explicit Export(TensorView v) : view(std::move(v)) {
    managed.context = this;
    managed.deleter = [](Managed* self) { delete static_cast<Export*>(self->context); };
    managed.tensor = {.data = reinterpret_cast<void*>(view.data.value),
                      .device = view.device,
                      .ndim = static_cast<std::int32_t>(view.shape.size()),
                      .dtype = view.dtype,
                      .shape = view.shape.data(),
                      .strides = view.strides.data(),
                      .byte_offset = 0};
  }

  TensorView view;
  Managed managed{};
};

// A capsule that nobody consumed still has its name; a consumer renames it and calls the deleter.
template <class Managed>
void destroy_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, Abi<Managed>::kName)) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, Abi<Managed>::kName));
  managed->deleter(managed);
}

template <class Managed>
py::object make_capsule(const TensorView& view) {
  auto exported = std::make_unique<Export<Managed>>(view);
  if constexpr (requires { exported->managed.version; }) exported->managed.version = {1, 1};
  PyObject* capsule =
      PyCapsule_New(&exported->managed, Abi<Managed>::kName, &destroy_capsule<Managed>);
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();
  return py::reinterpret_steal<py::object>(capsule);
}

using Pair = std::pair<int, int>;

// The consumer's stream (None, -1, or a handle; 0 is ambiguous and forbidden by the standard).
// There is nothing to hand over: what fills this memory are the caller's own kernels, and what
// kvspan itself queues is ordered on the stream that the caller gave to the call that queued it.
void check_stream(const TensorView& view, const py::object& stream) {
  if (stream.is_none()) return;
  if (view.device.type == dlpack::kCpu) {
    throw py::buffer_error("a CPU tensor has no stream; pass stream=None");
  }
  const auto handle = py::cast<std::int64_t>(stream);
  if (handle < -1 || handle == 0) {
    throw py::buffer_error(
        "stream must be None, -1, 1 (the legacy default stream), 2 (the "
        "per-thread one) or a stream's handle, not " +
        std::to_string(handle));
  }
}

py::object to_dlpack(const TensorView& view, const py::object& stream,
                     const std::optional<Pair>& max_version, const std::optional<Pair>& dl_device,
                     const std::optional<bool>& copy) {
  check_stream(view, stream);
  if (dl_device && *dl_device != Pair(view.device.type, view.device.id)) {
    throw py::buffer_error(
        "this tensor is a view of its device's memory and is not copied to "
        "another device here");
  }
  if (copy.value_or(false)) throw py::buffer_error("views are not copied here; copy the result");
  if (max_version && max_version->first >= 1) {
    return make_capsule<dlpack::ManagedTensorVersioned>(view);
  }
  return make_capsule<dlpack::ManagedTensor>(view);
}

}  // namespace

dlpack::Device dlpack_device(const Traits& traits) {
  return {traits.kind == DeviceKind::cuda ? dlpack::kCuda : dlpack::kCpu, traits.ordinal};
}

void bind_tensor_view(py::module_& m) {
  py::class_<TensorView>(m, "TensorView",
                         "Memory on its way into a tensor, by the DLPack protocol.")
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const TensorView& view) { return Pair(view.device.type, view.device.id); })
      .def_property_readonly("address", [](const TensorView& view) { return view.data.value; });
}

}  // namespace kvspan
