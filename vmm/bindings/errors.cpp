// C++ exceptions become Python ones that also derive from the builtin a user would expect.
#include "core/errors.hpp"

#include <array>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvspan {

namespace {

// Types live as long as the interpreter: the translator may run until its very end.
struct ErrorTypes {
  PyObject* error;
  PyObject* out_of_memory;
  PyObject* invalid_argument;
  PyObject* capacity;
  PyObject* driver;
  PyObject* released;
  PyObject* busy;
};

ErrorTypes& types() {
  static ErrorTypes instance{};
  return instance;
}

PyObject* add_type(py::module_& m, const std::string& name, const char* doc, PyObject* base,
                   PyObject* builtin) {
  const std::string qualified = "kvspan." + name;
  py::tuple bases = py::make_tuple(py::handle(base));
  if (builtin != nullptr) bases = py::make_tuple(py::handle(base), py::handle(builtin));
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name.c_str()) = py::handle(type);
  return type;
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

void bind_errors(py::module_& m) {
  ErrorTypes& t = types();
  t.error = add_type(m, "Error", "Base class of kvspan's errors.", PyExc_Exception, nullptr);
  t.out_of_memory =
      add_type(m, "OutOfMemory",
               "Physical memory is short. Everything is as it was before the call.\n\n"
               "Attributes `requested`, `free` and `reclaimable` are in bytes.",
               t.error, PyExc_MemoryError);
  t.invalid_argument =
      add_type(m, "InvalidArgument", "An argument that can never work.", t.error, PyExc_ValueError);
  t.capacity = add_type(m, "CapacityError",
                        "A limit other than memory is reached: slots, positions, mappings, address "
                        "space.",
                        t.error, PyExc_RuntimeError);
  t.driver = add_type(m, "DriverError",
                      "The operating system or the driver refused a call.\n\n"
                      "Attribute `call` is its name, `code` the error's.",
                      t.error, PyExc_OSError);
  t.released = add_type(m, "ReleasedError",
                        "The object was released or closed, or belongs to the parent of a fork.",
                        t.error, PyExc_RuntimeError);
  t.busy = add_type(m, "BusyError", "Another thread is inside a call on the same sequence.",
                    t.error, PyExc_RuntimeError);
  py::register_exception_translator(&translate);
}

}  // namespace kvspan
