// The primary context of a device, which torch and everybody else in the process use too, and a
// guard that makes it current on the calling thread for as long as a call lasts, in the relaxed
// mode of stream capture (cuda_capture.hpp says why).
//
// Parts of the backend share a context and may outlive the backend, so it is the context that
// counts what release paths could not do.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "backend/cuda_driver.hpp"

namespace kvspan::cuda {

class Context {
 public:
  // Throws InvalidArgument when there is no such device, or it cannot do virtual memory management.
  explicit Context(int ordinal);
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  const Driver& api() const noexcept { return api_; }
  CUdevice device() const noexcept { return device_; }
  CUcontext handle() const noexcept { return handle_; }

  // For release paths: a call that failed is counted, and what it should have released leaks.
  void report_unless(CUresult result) const noexcept {
    // Relaxed: a figure, it orders nothing.
    if (result != CUDA_SUCCESS) failures_.fetch_add(1, std::memory_order_relaxed);
  }
  std::uint64_t failures() const noexcept { return failures_.load(std::memory_order_relaxed); }

 private:
  const Driver& api_;
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
  mutable std::atomic<std::uint64_t> failures_{0};
};

// Leaves the thread's own context and mode as they were; pushes nothing where ours is current.
class Current {
 public:
  // Throws DriverError: nothing must be done in a context that may be another one.
  explicit Current(const Context& context);
  // For release paths, which go on: what they release is named by handle, in whatever context.
  Current(const Context& context, std::nothrow_t) noexcept;
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current();

 private:
  CUresult enter(const char** call) noexcept;
  void leave() noexcept;

  const Context& context_;
  bool is_pushed_ = false;
  bool is_relaxed_ = false;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // then: the thread's own
};

}  // namespace kvspan::cuda
