#include "backend/cuda_frames.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

namespace {

constexpr CUmemAllocationHandleType kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

std::string name_of(FrameId frame) {
  return "frame " + std::to_string(frame.index()) + " of class " +
         std::to_string(frame.size_class().value);
}

CUmemAllocationProp properties_of(const CudaOptions& o) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = o.ordinal;
  properties.requestedHandleTypes = o.is_shareable ? kDescriptor : CU_MEM_HANDLE_TYPE_NONE;
  return properties;
}

}  // namespace

MemoryInfo memory_of(const Context& context, Bytes reserve) {
  const Driver& api = context.api();
  std::size_t free = 0, total = 0;
  check(api, api.cuMemGetInfo(&free, &total), "cuMemGetInfo", "cannot ask how much memory is left");
  return {Bytes(total), Bytes(free - std::min<std::uint64_t>(free, reserve.value))};
}

Frames::Frames(const Context& context, const CudaOptions& o)
    : context_(context),
      api_(context.api()),
      options_(o),
      n_pages_(o.capacity.value / o.page_size.value) {
  for (unsigned c = 0; c <= o.largest_class.value; ++c) {
    table_.push_back(std::make_unique<Handle[]>(n_pages_ >> c));
  }
}

Frames::~Frames() {
  const Current current(context_, std::nothrow);
  release_all();
}

std::span<Handle> Frames::entries(FrameRun run) const {
  const std::size_t c = run.first.size_class().value;
  if (run.count == 0 || c >= table_.size() ||
      std::uint64_t{run.first.index()} + run.count > n_pages_ >> c) {
    throw InvalidArgument(std::to_string(run.count) + " frames from " + name_of(run.first) +
                          " on are not of this pool");
  }
  return {&table_[c][run.first.index()], run.count};
}

void Frames::require_absent(std::span<const Handle> entries) const {
  if (std::ranges::any_of(entries, [](Handle handle) { return handle != 0; })) {
    throw InvalidArgument("a frame that is present already cannot be created or imported");
  }
}

void Frames::create(FrameRun run) {
  const std::span<Handle> handles = entries(run);
  require_absent(handles);
  const Bytes size = frame_size(run);
  try {
    make_handles(handles, size);
  } catch (...) {
    for (Handle& handle : handles) release_handle(handle);
    throw;
  }
  created_.fetch_add(size.value * run.count, std::memory_order_relaxed);
}

void Frames::make_handles(std::span<Handle> handles, Bytes size) {
  const CUmemAllocationProp properties = properties_of(options_);
  const Bytes asked = size * handles.size();
  const auto refuse = [&](Bytes free) {
    throw OutOfMemory(asked, free, Bytes(0),
                      "cuda:" + std::to_string(options_.ordinal) + " has no more, " +
                          to_string(options_.reserve) +
                          " of which are kept for others (`reserve`): release sequences, trim the "
                          "pool, or leave it more of the device");
  };
  const Bytes free = memory_of(context_, options_.reserve).available;
  if (free < asked) refuse(free);
  for (Handle& handle : handles) {
    Handle made = 0;
    const CUresult result = api_.cuMemCreate(&made, size.value, &properties, 0);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      refuse(memory_of(context_, options_.reserve).available);
    }
    check(api_, result, "cuMemCreate",
          "cannot create one of " + std::to_string(handles.size()) + " frames of " +
              to_string(size) + ", with " + to_string(free) + " free");
    handle = made;
  }
}

void Frames::release_handle(Handle& handle) noexcept {
  if (handle == 0) return;
  context_.report_unless(api_.cuMemRelease(handle));
  handle = 0;
}

void Frames::release(FrameRun run) {
  const Bytes size = frame_size(run);
  std::uint64_t n_own = 0;
  FrameId frame = run.first;
  for (Handle& handle : entries(run)) {
    bool is_imported = false;
    {
      const std::scoped_lock lock(mutex_);
      is_imported = imported_.erase(frame) != 0;
    }
    if (handle == 0) {
      context_.report_unless(CUDA_ERROR_INVALID_HANDLE);
    } else if (!is_imported) {
      ++n_own;
    }
    release_handle(handle);
    frame = frame.next();
  }
  created_.fetch_sub(size.value * n_own, std::memory_order_relaxed);
}

void Frames::release_all() noexcept {
  for (std::size_t c = 0; c < table_.size(); ++c) {
    for (std::uint64_t i = 0; i < n_pages_ >> c; ++i) release_handle(table_[c][i]);
  }
  created_.store(0, std::memory_order_relaxed);
}

ExportedFrame Frames::export_frame(FrameId frame) {
  const Handle handle = entries({frame, 1})[0];
  if (!options_.is_shareable) {
    throw InvalidArgument("this pool's frames cannot be exported: make it with shareable=True");
  }
  if (handle == 0) throw InvalidArgument(name_of(frame) + " is not there, and cannot be exported");
  int fd = -1;
  check(api_, api_.cuMemExportToShareableHandle(&fd, handle, kDescriptor, 0),
        "cuMemExportToShareableHandle", "cannot export " + name_of(frame));
  // Nothing says whether the driver has done so.
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    const int error_number = errno;
    close(fd);
    throw system_error("fcntl", error_number, "cannot keep an exported frame from other programs");
  }
  return {fd, Bytes(0), frame_size({frame, 1})};
}

void Frames::import_frame(FrameId frame, const ExportedFrame& exported) {
  const std::span<Handle> entry = entries({frame, 1});
  require_absent(entry);
  const Bytes size = frame_size({frame, 1});
  if (exported.fd < 0 || exported.offset != Bytes(0) || exported.size != size) {
    throw InvalidArgument("a frame of " + to_string(size) + " cannot be imported from " +
                          to_string(exported.size) + " at offset " + to_string(exported.offset) +
                          " of descriptor " + std::to_string(exported.fd) +
                          ": both pools need the same page_size, and frames of one class");
  }
  const std::scoped_lock lock(mutex_);
  const auto [it, is_new] = imported_.insert(frame);
  Handle handle = 0;
  const CUresult result = api_.cuMemImportFromShareableHandle(
      &handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(exported.fd)), kDescriptor);
  if (result != CUDA_SUCCESS) {
    imported_.erase(it);
    throw_error(api_, "cuMemImportFromShareableHandle", result,
                "cannot import a frame from descriptor " + std::to_string(exported.fd));
  }
  entry[0] = handle;
}

}  // namespace kvspan::cuda
