// The ids of a frame pool, for engines that keep block tables themselves: calls fill and read the
// caller's buffers. They keep the GIL, for they take less time than dropping it and getting it
// back.
#include "pool/frame_pool.hpp"

#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "bindings/bindings.hpp"
#include "core/errors.hpp"

namespace py = pybind11;

namespace kvspan {

namespace {

constexpr SizeClass kPages{0};  // the class whose ids are plain numbers, from 0 on

// What an object gives by the buffer protocol, for the length of a call.
class IdBuffer {
 public:
  enum Access : int { reads = PyBUF_C_CONTIGUOUS, writes = PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE };

  IdBuffer(py::handle object, Access access) {
    if (PyObject_GetBuffer(object.ptr(), &view_, access | PyBUF_FORMAT) != 0) {
      const py::error_already_set e;
      if (e.matches(PyExc_MemoryError)) throw e;
      refuse(object, py::str(e.value()));
    }
    const std::string why = fault();
    if (!why.empty()) {
      PyBuffer_Release(&view_);
      refuse(object, why);
    }
  }
  IdBuffer(const IdBuffer&) = delete;
  IdBuffer& operator=(const IdBuffer&) = delete;
  ~IdBuffer() { PyBuffer_Release(&view_); }

  std::size_t size() const noexcept {
    return static_cast<std::size_t>(view_.len) / sizeof(FrameId);
  }
  // A FrameId is its number.
  std::span<FrameId> ids() const noexcept { return {static_cast<FrameId*>(view_.buf), size()}; }

 private:
  // Signed numbers will do, as kernels want them in block tables: a negative one names no frame.
  std::string fault() const {
    std::string_view type(view_.format);
    if (type.find_first_of("<=@") == 0) type.remove_prefix(1);
    const bool is_integer = type.size() == 1 && type.find_first_of("IiLl") == 0;
    if (!is_integer || view_.itemsize != sizeof(FrameId)) {
      return "items of format '" + std::string(view_.format) + "'";
    }
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(view_.buf) % alignof(FrameId) == 0;
    return is_aligned ? "" : "an address that is no multiple of 4";
  }

  [[noreturn]] static void refuse(py::handle object, const std::string& why) {
    throw InvalidArgument(
        "frames are a contiguous buffer of 32-bit integers (for take, a writable one): an array of "
        "NumPy, array.array('I'), or tensor.numpy(), which shares the tensor's memory; not this " +
        std::string(Py_TYPE(object.ptr())->tp_name) + ": " + why);
  }

  Py_buffer view_;
};

void take(FramePool& pool, py::handle out) {
  const IdBuffer buffer(out, IdBuffer::writes);
  if (pool.take(kPages, buffer.ids())) return;
  const FramePool::Counts counts = pool.counts(kPages);
  throw OutOfFrames(buffer.size(), counts.fresh + counts.free,
                    "nothing was taken; give frames back, preempt a request, or wait");
}

void check(std::uint32_t n_refused, const IdBuffer& buffer, const std::string& done) {
  if (n_refused == 0) return;
  throw RefusedError(n_refused, std::to_string(n_refused) + " of " + std::to_string(buffer.size()) +
                                    " frames were refused, as they are not in use (given back "
                                    "twice?) or not of this pool; the others were " +
                                    done);
}

void share(FramePool& pool, py::handle frames) {
  const IdBuffer buffer(frames, IdBuffer::reads);
  check(pool.share(buffer.ids()), buffer, "shared");
}

std::uint32_t give(FramePool& pool, py::handle frames) {
  const IdBuffer buffer(frames, IdBuffer::reads);
  const FramePool::Given given = pool.give(buffer.ids());
  check(given.refused, buffer, "given back");
  return given.freed;
}

// Whatever is no id becomes the one that names no frame.
FrameId id_of(std::int64_t number) {
  FrameId id;
  if (std::in_range<std::uint32_t>(number)) id.value = static_cast<std::uint32_t>(number);
  return id;
}

// kvspan.FramePool inherits these three as they are: a function of Python's around them would cost
// half as much again.
constexpr const char* kTakeDoc = R"(Fill `out` with frames that nobody else has.

All or nothing. Each has one reference. Adjacent frames where there are some, and frames that were
given back before ones that were never taken.

Parameters
----------
out
    A contiguous writable buffer of 32-bit integers, signed or not, of any shape.

Raises
------
OutOfMemory
    Fewer are available. Nothing was taken and `out` is as it was; ``requested`` and ``free`` are
    in frames.
InvalidArgument
    `out` is no such buffer.
)";
constexpr const char* kShareDoc =
    R"(Add a reference to each frame, so that one more `give` of it is needed.

Parameters
----------
frames
    A contiguous buffer of 32-bit integers. Whoever calls holds them, so that nobody frees them
    meanwhile. A frame that stands there twice gets two.

Raises
------
RefusedError
    Some are not in use, or not of this pool. **The others are shared.**
InvalidArgument
    `frames` is no such buffer.
)";
constexpr const char* kGiveDoc =
    R"(Take a reference from each frame; those without one left are free.

Parameters
----------
frames
    A contiguous buffer of 32-bit integers: those of one request or of many, in any order.

Returns
-------
int
    How many came free: all, unless some are shared.

Raises
------
RefusedError
    Some are free already, so this is a second `give`, or not of this pool. They are left alone,
    and **the others are given back**.
InvalidArgument
    `frames` is no such buffer.
)";

}  // namespace

void bind_frame_pool(py::module_& m) {
  py::class_<FramePool>(m, "FramePoolHandle")
      .def(py::init([](std::uint32_t n_frames) {
             return std::make_unique<FramePool>(Pages(n_frames), kPages);
           }),
           py::arg("n_frames"))
      .def("take", &take, py::arg("out"), kTakeDoc)
      .def("share", &share, py::arg("frames"), kShareDoc)
      .def("give", &give, py::arg("frames"), kGiveDoc)
      .def(
          "references",
          [](const FramePool& pool, std::int64_t frame) { return pool.references(id_of(frame)); },
          py::arg("frame"), "Return how many hold the frame; 0 when it is free or foreign.")
      .def("counts", [](const FramePool& pool) {
        const FramePool::Counts counts = pool.counts(kPages);
        return std::tuple(counts.fresh, counts.free, counts.in_use);
      });
}

}  // namespace kvspan
