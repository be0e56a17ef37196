#include "backend/cuda_context.hpp"

namespace kvspan::cuda {

Context::Context(int ordinal) : api_(driver()) {
  check(api_, api_.cuInit(0), "cuInit",
        "the driver does not start: is there a GPU? device=\"cpu\" needs none");
  int count = 0;
  check(api_, api_.cuDeviceGetCount(&count), "cuDeviceGetCount", "cannot count the devices");
  if (ordinal < 0 || ordinal >= count) {
    throw InvalidArgument("there is no cuda:" + std::to_string(ordinal) + ": the driver sees " +
                          std::to_string(count) + " devices (CUDA_VISIBLE_DEVICES limits them)");
  }
  check(api_, api_.cuDeviceGet(&device_, ordinal), "cuDeviceGet",
        "cannot get cuda:" + std::to_string(ordinal));
  int is_supported = 0;
  check(api_,
        api_.cuDeviceGetAttribute(&is_supported,
                                  CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device_),
        "cuDeviceGetAttribute", "cannot ask for virtual memory management");
  if (is_supported == 0) {
    throw InvalidArgument("cuda:" + std::to_string(ordinal) +
                          " has no virtual memory management; use another device");
  }
  check(api_, api_.cuDevicePrimaryCtxRetain(&handle_, device_), "cuDevicePrimaryCtxRetain",
        "cannot use cuda:" + std::to_string(ordinal));
}

Context::~Context() { api_.cuDevicePrimaryCtxRelease(device_); }  // nobody is left to be told

CUresult Current::enter(const char** call) noexcept {
  const Driver& api = context_.api();
  CUcontext now = nullptr;
  *call = "cuCtxGetCurrent";
  CUresult result = api.cuCtxGetCurrent(&now);
  if (result != CUDA_SUCCESS) return result;
  if (now != context_.handle()) {
    *call = "cuCtxPushCurrent";
    result = api.cuCtxPushCurrent(context_.handle());
    if (result != CUDA_SUCCESS) return result;
    is_pushed_ = true;
  }
  *call = "cuThreadExchangeStreamCaptureMode";
  result = api.cuThreadExchangeStreamCaptureMode(&mode_);
  is_relaxed_ = result == CUDA_SUCCESS;
  return result;
}

void Current::leave() noexcept {
  const Driver& api = context_.api();
  CUcontext ours = nullptr;
  if (is_relaxed_) context_.report_unless(api.cuThreadExchangeStreamCaptureMode(&mode_));
  if (is_pushed_) context_.report_unless(api.cuCtxPopCurrent(&ours));
}

Current::Current(const Context& context) : context_(context) {
  const char* call = nullptr;
  const CUresult result = enter(&call);
  if (result != CUDA_SUCCESS) leave();
  check(context.api(), result, call, "cannot use the device's context on this thread");
}

Current::Current(const Context& context, std::nothrow_t) noexcept : context_(context) {
  const char* call = nullptr;
  context.report_unless(enter(&call));
}

Current::~Current() { leave(); }

}  // namespace kvspan::cuda
