// The physical memory of a GPU's frames: one handle of the driver's each, in a table by size class.
//
// Nothing that the driver documents says what new memory holds, so whoever maps a frame first
// clears it, at the place where it is used: clearing it here would take a mapping of its own.
//
// Threads: everything may be called from any thread, with the context current; a frame's entry
// belongs to whoever creates, uses or releases that frame.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda_backend.hpp"
#include "backend/cuda_space.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

// The device's memory now, `reserve` taken off. Throws DriverError.
MemoryInfo memory_of(const Context& context, Bytes reserve);

class Frames {
 public:
  // `options` have been checked.
  Frames(const Context& context, const CudaOptions& options);
  Frames(const Frames&) = delete;
  Frames& operator=(const Frames&) = delete;
  ~Frames();

  // All of these throw InvalidArgument for frames that are none of this pool's.
  void create(FrameRun run);
  void release(FrameRun run);
  ExportedFrame export_frame(FrameId frame);
  void import_frame(FrameId frame, const ExportedFrame& exported);
  std::span<const Handle> handles(FrameRun run) const { return entries(run); }

  // Everything that is left: fresh frames ahead of use, as a rule.
  void release_all() noexcept;

  Bytes frame_size(FrameRun run) const {
    return size_of(pages_of(run.first.size_class()), options_.page_size);
  }
  Bytes created() const noexcept { return Bytes(created_.load(std::memory_order_relaxed)); }

 private:
  std::span<Handle> entries(FrameRun run) const;
  void require_absent(std::span<const Handle> entries) const;
  void make_handles(std::span<Handle> handles, Bytes size);
  void release_handle(Handle& handle) noexcept;

  const Context& context_;
  const Driver& api_;
  const CudaOptions options_;
  const std::uint64_t n_pages_;
  std::vector<std::unique_ptr<Handle[]>> table_;  // by class; 0: absent
  std::atomic<std::uint64_t> created_{0};         // bytes; relaxed, only summed

  std::mutex mutex_;  // guards what follows
  std::set<FrameId> imported_;
};

}  // namespace kvspan::cuda
