#include "backend/cuda_mirror.hpp"

#include <cstring>

#include "backend/host_fork.hpp"

namespace kvspan::cuda {

CudaMirror::CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences,
                       Bytes size)
    : owner_(std::move(owner)),
      generation_(host_fork::generation()),
      context_(context),
      fences_(fences),
      bytes_(size.value) {
  const Driver& api = context.api();
  const auto allocated = [&](CUresult result, const char* call) {
    if (result == CUDA_SUCCESS) return;
    free();
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      throw OutOfMemory(size, Bytes(0), Bytes(0),
                        std::string(call) +
                            " has no memory for a batch's arrays: leave more of the "
                            "device to others (`reserve`), or make a smaller pool");
    }
    throw_error(api, call, result, "cannot make the arrays of a batch");
  };
  const Current current(context);
  allocated(api.cuMemAlloc(&device_, size.value), "cuMemAlloc");
  for (Buffer& buffer : ring_) {
    allocated(api.cuMemHostAlloc(&buffer.pinned, size.value, CU_MEMHOSTALLOC_PORTABLE),
              "cuMemHostAlloc");
  }
  try {
    publish({});  // zeros
  } catch (...) {
    free();
    throw;
  }
}

CudaMirror::~CudaMirror() {
  if (generation_ != host_fork::generation()) {
    // A child of fork(2) must not call the driver: nothing goes, not even the owner.
    static_cast<void>(new std::shared_ptr<void>(std::move(owner_)));
    return;
  }
  const Current current(context_);
  for (const Buffer& buffer : ring_) {
    try {
      fences_.wait(buffer.copied);
    } catch (const Error&) {
      // A copy that failed is over as well.
    }
  }
  free();
}

void CudaMirror::free() noexcept {
  const Driver& api = context_.api();
  for (const Buffer& buffer : ring_) {
    if (buffer.pinned != nullptr) api.cuMemFreeHost(buffer.pinned);
  }
  if (device_ != 0) api.cuMemFree(device_);
}

void CudaMirror::publish(Stream stream) {
  const std::scoped_lock lock(mutex_);
  const Current current(context_);
  const Driver& api = context_.api();
  Buffer& buffer = ring_[next_];
  fences_.wait(buffer.copied);  // of eight publications ago: done, as a rule
  std::memcpy(buffer.pinned, bytes_.data(), bytes_.size());
  const auto on = reinterpret_cast<CUstream>(stream.handle);
  check(api, api.cuMemcpyHtoDAsync(device_, buffer.pinned, bytes_.size(), on), "cuMemcpyHtoDAsync",
        "cannot bring a batch's arrays up to date");
  next_ = (next_ + 1) % ring_.size();
  try {
    buffer.copied = fences_.record(on);
  } catch (...) {
    api.cuStreamSynchronize(on);  // without a fence nobody could tell when the buffer is free again
    throw;
  }
}

}  // namespace kvspan::cuda
