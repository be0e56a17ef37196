// C++ exceptions become the Python ones of kvspan.errors.
#include "core/errors.hpp"

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvspan {

namespace {

// Never destroyed: the translator may run until the interpreter's very end.
struct ErrorTypes {
  explicit ErrorTypes(const py::module_& errors)
      : error(py::object(errors.attr("Error")).release().ptr()),
        out_of_memory(py::object(errors.attr("OutOfMemory")).release().ptr()),
        invalid_argument(py::object(errors.attr("InvalidArgument")).release().ptr()),
        capacity(py::object(errors.attr("CapacityError")).release().ptr()),
        driver(py::object(errors.attr("DriverError")).release().ptr()),
        released(py::object(errors.attr("ReleasedError")).release().ptr()),
        busy(py::object(errors.attr("BusyError")).release().ptr()),
        refused(py::object(errors.attr("RefusedError")).release().ptr()) {}

  PyObject* error;
  PyObject* out_of_memory;
  PyObject* invalid_argument;
  PyObject* capacity;
  PyObject* driver;
  PyObject* released;
  PyObject* busy;
  PyObject* refused;
};

const ErrorTypes& types() {
  static const auto* instance = new ErrorTypes(py::module_::import("kvspan.errors"));
  return *instance;
}

void raise(PyObject* type, const char* message,
           std::initializer_list<std::pair<const char*, py::object>> attributes = {}) {
  py::object error = py::reinterpret_steal<py::object>(PyObject_CallFunction(type, "s", message));
  if (!error) return;  // Python's own error is set
  for (const auto& [name, value] : attributes) error.attr(name) = value;
  PyErr_SetObject(type, error.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const OutOfMemory& e) {
    raise(types().out_of_memory, e.what(),
          {{"requested", py::int_(e.requested().value)},
           {"free", py::int_(e.free().value)},
           {"reclaimable", py::int_(e.reclaimable().value)}});
  } catch (const OutOfFrames& e) {
    raise(types().out_of_memory, e.what(),
          {{"requested", py::int_(e.requested())},
           {"free", py::int_(e.free())},
           {"reclaimable", py::int_(0)}});
  } catch (const RefusedError& e) {
    raise(types().refused, e.what(), {{"n_refused", py::int_(e.n_refused())}});
  } catch (const DriverError& e) {
    raise(types().driver, e.what(), {{"call", py::str(e.call())}, {"code", py::str(e.code())}});
  } catch (const InvalidArgument& e) {
    raise(types().invalid_argument, e.what());
  } catch (const CapacityError& e) {
    raise(types().capacity, e.what());
  } catch (const ReleasedError& e) {
    raise(types().released, e.what());
  } catch (const BusyError& e) {
    raise(types().busy, e.what());
  } catch (const Error& e) {
    raise(types().error, e.what());
  }
}

}  // namespace

void register_errors() {
  types();  // a missing class shows on import
  py::register_exception_translator(&translate);
}

}  // namespace kvspan
