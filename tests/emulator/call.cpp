#include "call.h"

#include <algorithm>

namespace emulator {

CUresult Call::begin() {
  s.calls.began(name);
  if (const auto fault = s.calls.fault(name)) return *fault;
  if ((needs_ & kInit) != 0 && !s.initialised) {
    return misuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit has not been called");
  }
  if (in_host_function() && (needs_ & kInit) != 0) {
    // cuLaunchHostFunc: "The host function must not make any CUDA API calls."
    return violation(CUDA_ERROR_NOT_PERMITTED, "called from a host function");
  }
  context = current_context();
  if (needs_ == kContext && context == nullptr) {
    return misuse(
        current_destroyed() ? CUDA_ERROR_CONTEXT_IS_DESTROYED : CUDA_ERROR_INVALID_CONTEXT,
        current_destroyed() ? "the current context was released" : "no context is current");
  }
  if (s.capture.forbids(name)) {
    return violation(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                     "potentially unsafe while a stream is being captured, which this would spoil");
  }
  s.streams.catch_up(lock);
  return CUDA_SUCCESS;
}

void Call::charge(std::size_t handles) {
  if (charged_) return;
  charged_ = true;
  handles_ = handles;
  s.clock.charge(name, std::max<std::size_t>(handles, 1), context != nullptr ? context->device : 0);
  s.streams.catch_up(lock);
}

CUresult Call::end(CUresult result, std::initializer_list<std::uint64_t> arguments) {
  charge(0);
  s.calls.ended(name, result == CUDA_SUCCESS ? handles_ : 0, result, s.clock.lane_number(),
                s.clock.lane().now_us, arguments);
  return result;
}

CUresult Call::misuse(CUresult result, const std::string& what) {
  return s.options.misuse_is_violation ? violation(result, what) : result;
}

CUresult Call::bad_device(CUdevice device) {
  return misuse(CUDA_ERROR_INVALID_DEVICE, text("there is no device %d", device));
}

CUresult Call::violation(CUresult result, const std::string& what) {
  s.report.violation(std::string(name) + ": " + what);
  return result;
}

}  // namespace emulator
