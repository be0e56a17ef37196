#include "backend/cuda_capture.hpp"

#include "core/errors.hpp"

namespace kvspan::cuda {

void require_no_capture(const Driver& api, CUstream stream) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = api.cuStreamIsCapturing(stream, &status);
  // The legacy default stream cannot be captured, nor used while a stream that waits for it is.
  if (result != CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) {
    check(api, result, "cuStreamIsCapturing", "cannot tell whether the stream is being captured");
    if (status == CU_STREAM_CAPTURE_STATUS_NONE) return;
  }
  throw InvalidArgument(
      "the stream is being captured into a CUDA graph, which cannot hold what kvspan does: extend, "
      "step, truncate, fork and release before or after the capture, or on another stream; capture "
      "the kernels, which find lengths and slots in the batch's tensors at each replay");
}

}  // namespace kvspan::cuda
