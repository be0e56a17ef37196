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

Context::~Context() { api_.cuDevicePrimaryCtxRelease(device_); }

}  // namespace kvspan::cuda
