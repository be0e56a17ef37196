#include "backend/cuda_mirror.hpp"

#include <cstring>

#include "backend/cuda_capture.hpp"
#include "backend/host_fork.hpp"

namespace kvspan::cuda {

CudaMirror::CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences,
                       MirrorMemory& memory, Bytes size, Stream own)
    : owner_(std::move(owner)),
      generation_(host_fork::generation()),
      context_(context),
      fences_(fences),
      memory_(memory),
      bytes_(size.value) {
  const Current current(context);
  block_ = memory.take(size);
  try {
    publish(own);                    // zeros,
    fences_.wait(block_.copied[0]);  // before whatever is published on another stream
  } catch (...) {
    tear_down();
    throw;
  }
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
  try {
    block_.read = fences_.record(reinterpret_cast<CUstream>(last_.handle));
  } catch (const Error&) {
    block_.is_read_known = false;  // it serves nobody any more
    context_.report_unless(CUDA_ERROR_UNKNOWN);
  }
  memory_.give(block_);
}

void CudaMirror::publish(Stream stream) {
  const std::scoped_lock lock(mutex_);
  const Current current(context_);
  const Driver& api = context_.api();
  const auto on = reinterpret_cast<CUstream>(stream.handle);
  require_no_capture(api, on);
  fences_.wait(block_.copied[next_]);  // of a ring of publications ago: done, as a rule
  std::byte* const buffer = block_.pinned + next_ * bytes_.size();
  std::memcpy(buffer, bytes_.data(), bytes_.size());
  check(api, api.cuMemcpyHtoDAsync(block_.device, buffer, bytes_.size(), on), "cuMemcpyHtoDAsync",
        "cannot bring a batch's arrays up to date");
  last_ = stream;
  try {
    block_.copied[next_] = fences_.record(on);
  } catch (...) {
    // Without a fence nobody could tell when the buffer is free again.
    context_.report_unless(api.cuStreamSynchronize(on));
    throw;
  }
  next_ = (next_ + 1) % MirrorBlock::kBuffers;
}

}  // namespace kvspan::cuda
