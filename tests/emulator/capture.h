// Stream capture as far as bystanders feel it: a stream that a test has declared to be captured
// takes no work from clients that must keep out of graphs, and calls that a capture does not see
// are refused according to the modes of the capture and of the calling thread. Nothing is recorded.
#pragma once

#include <string_view>
#include <thread>

#include "cuda_api.h"

namespace emulator {

struct Stream;

struct Capture {
  const Stream* stream = nullptr;  // nullptr: there is none
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;

  // Whether the call is potentially unsafe, and the calling thread must not make it now.
  bool forbids(std::string_view call) const;
  // Whether use of `other` would wait for the captured stream: the legacy one, if that is blocking.
  bool is_implied_by(const Stream& other) const;
};

// The calling thread's mode.
CUstreamCaptureMode& capture_mode();

}  // namespace emulator
