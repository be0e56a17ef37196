#include "capture.h"

#include <algorithm>
#include <array>

#include "streams.h"

namespace emulator {
namespace {

// No list is published. Cautious: what allocates, maps, asks or waits without being queued.
constexpr std::array<std::string_view, 22> kUnsafe = {"cuMemAddressReserve",
                                                      "cuMemAddressFree",
                                                      "cuMemCreate",
                                                      "cuMemRelease",
                                                      "cuMemMap",
                                                      "cuMemUnmap",
                                                      "cuMemSetAccess",
                                                      "cuMemExportToShareableHandle",
                                                      "cuMemAlloc",
                                                      "cuMemImportFromShareableHandle",
                                                      "cuMemFree",
                                                      "cuMemHostAlloc",
                                                      "cuMemAllocHost",
                                                      "cuMemFreeHost",
                                                      "cuMemHostRegister",
                                                      "cuMemHostUnregister",
                                                      "cuEventQuery",
                                                      "cuEventSynchronize",
                                                      "cuStreamQuery",
                                                      "cuStreamSynchronize",
                                                      "cuCtxSynchronize",
                                                      "cuMemcpy"};

}  // namespace

// cuThreadExchangeStreamCaptureMode: "If the local thread has an ongoing capture sequence that was
// not initiated with CU_STREAM_CAPTURE_MODE_RELAXED at cuStreamBeginCapture, or if any other thread
// has a concurrent capture sequence initiated with CU_STREAM_CAPTURE_MODE_GLOBAL, this thread is
// prohibited from potentially unsafe API calls" (GLOBAL); THREAD_LOCAL ignores other threads,
// RELAXED both.
bool Capture::forbids(std::string_view call) const {
  if (stream == nullptr || capture_mode() == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  const bool is_own = thread == std::this_thread::get_id();
  const bool matters = is_own ? mode != CU_STREAM_CAPTURE_MODE_RELAXED
                              : mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                                    capture_mode() == CU_STREAM_CAPTURE_MODE_GLOBAL;
  return matters && std::find(kUnsafe.begin(), kUnsafe.end(), call) != kUnsafe.end();
}

bool Capture::is_implied_by(const Stream& other) const {
  return stream != nullptr && other.legacy && (stream->flags & CU_STREAM_NON_BLOCKING) == 0;
}

CUstreamCaptureMode& capture_mode() {
  thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  return mode;
}

}  // namespace emulator
