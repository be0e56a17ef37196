// The primary context of a device, which torch and everybody else in the process use too, and a
// guard that makes it current on the calling thread for as long as a call lasts.
#pragma once

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

 private:
  const Driver& api_;
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
};

// Leaves the thread's own context as it was. A failure shows in the calls that follow.
class Current {
 public:
  explicit Current(const Context& context) noexcept : api_(context.api()) {
    CUcontext now = nullptr;
    api_.cuCtxGetCurrent(&now);
    is_pushed_ = now != context.handle() && api_.cuCtxPushCurrent(context.handle()) == CUDA_SUCCESS;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    CUcontext ours = nullptr;
    if (is_pushed_) api_.cuCtxPopCurrent(&ours);
  }

 private:
  const Driver& api_;
  bool is_pushed_ = false;
};

}  // namespace kvspan::cuda
