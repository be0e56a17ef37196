#include "backend/cuda_mirror.hpp"

#include <cstring>

#include "backend/cuda_capture.hpp"
#include "backend/host_fork.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

CudaMirror::CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences,
                       Bytes size)
    : owner_(std::move(owner)),
      generation_(host_fork::generation()),
      context_(context),
      fences_(fences),
      bytes_(size.value) {
  const Current current(context);
  try {
    allocate(size);
    publish({});               // zeros,
    fences_.wait(copied_[0]);  // before whatever is published on another stream
  } catch (...) {
    tear_down();
    throw;
  }
}

void CudaMirror::allocate(Bytes size) {
  const Driver& api = context_.api();
  const auto require = [&](CUresult result, const char* call, Bytes asked) {
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      std::size_t free = 0, total = 0;
      api.cuMemGetInfo(&free, &total);  // for the message only: zero where it fails
      throw OutOfMemory(asked, Bytes(free), Bytes(0),
                        std::string(call) +
                            " has no memory for a batch's arrays: leave more of the device to "
                            "others (`reserve`), or make a smaller pool");
    }
    check(api, result, call, "cannot make a batch's arrays of " + to_string(asked));
  };
  require(api.cuMemAlloc(&device_, size.value), "cuMemAlloc", size);
  void* pinned = nullptr;
  require(api.cuMemHostAlloc(&pinned, size.value * kBuffers, CU_MEMHOSTALLOC_PORTABLE),
          "cuMemHostAlloc", size * kBuffers);
  pinned_ = static_cast<std::byte*>(pinned);
}

CudaMirror::~CudaMirror() {
  if (generation_ != host_fork::generation()) {
    // A child of fork(2) must not call the driver: nothing goes, not even the owner.
    static_cast<void>(new std::shared_ptr<void>(std::move(owner_)));
    return;
  }
  const Current current(context_, std::nothrow);
  tear_down();
}

void CudaMirror::tear_down() noexcept {
  const Driver& api = context_.api();
  try {
    for (const Fence fence : copied_) fences_.wait(fence);
  } catch (const Error&) {
    context_.report_unless(CUDA_ERROR_UNKNOWN);
    if (api.cuCtxSynchronize() != CUDA_SUCCESS) return;  // the copies may still read: it leaks
  }
  if (pinned_ != nullptr) context_.report_unless(api.cuMemFreeHost(pinned_));
  if (device_ != 0) context_.report_unless(api.cuMemFree(device_));
}

void CudaMirror::publish(Stream stream) {
  const std::scoped_lock lock(mutex_);
  const Current current(context_);
  const Driver& api = context_.api();
  const auto on = reinterpret_cast<CUstream>(stream.handle);
  require_no_capture(api, on);
  fences_.wait(copied_[next_]);  // of a ring of publications ago: done, as a rule
  std::byte* const buffer = pinned_ + next_ * bytes_.size();
  std::memcpy(buffer, bytes_.data(), bytes_.size());
  check(api, api.cuMemcpyHtoDAsync(device_, buffer, bytes_.size(), on), "cuMemcpyHtoDAsync",
        "cannot bring a batch's arrays up to date");
  try {
    copied_[next_] = fences_.record(on);
  } catch (...) {
    // Without a fence nobody could tell when the buffer is free again.
    context_.report_unless(api.cuStreamSynchronize(on));
    throw;
  }
  next_ = (next_ + 1) % kBuffers;
}

}  // namespace kvspan::cuda
