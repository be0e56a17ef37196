// Driver calls about the driver itself and its devices.
#include <algorithm>
#include <cstring>

#include "call.h"

using emulator::Call;
using emulator::enter;
using emulator::text;

namespace {

constexpr int kMajor = 8, kMinor = 0;

int attribute(const emulator::Options& options, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 108;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return kMajor;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return kMinor;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 2;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      return device + 1;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
      return options.memory_free ? 0 : 1;
    default:
      return 0;
  }
}

}  // namespace

CUresult CUDAAPI cuInit(unsigned int flags) {
  return enter("cuInit", Call::kNothing, {flags}, [&](Call& call) -> CUresult {
    if (flags != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0");
    if (call.s.options.devices == 0) return CUDA_ERROR_NO_DEVICE;
    call.s.initialised = true;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
  return enter("cuDriverGetVersion", Call::kNothing, {}, [&](Call& call) -> CUresult {
    if (version == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *version = call.s.options.driver;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  return enter("cuDeviceGet", Call::kInit, {static_cast<unsigned>(ordinal)},
               [&](Call& call) -> CUresult {
                 if (device == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 if (call.no_device(ordinal)) return call.bad_device(ordinal);
                 *device = ordinal;
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
  return enter("cuDeviceGetCount", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (count == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *count = call.s.options.devices;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  return enter("cuDeviceGetName", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (name == nullptr || length <= 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "no room");
    if (call.no_device(device)) return call.bad_device(device);
    const std::string_view own = "kvspan emulator (no GPU)";
    const std::size_t n = std::min(own.size(), static_cast<std::size_t>(length - 1));
    std::memcpy(name, own.data(), n);
    name[n] = '\0';
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  return enter("cuDeviceGetUuid", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (uuid == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.no_device(device)) return call.bad_device(device);
    std::memcpy(uuid->bytes, "kvspan emulator", 15);
    uuid->bytes[15] = static_cast<char>(device);
    return CUDA_SUCCESS;
  });
}

#undef cuDeviceGetUuid
EMULATOR_EXPORT CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  return cuDeviceGetUuid_v2(uuid, device);
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return enter("cuDeviceGetAttribute", Call::kInit, {static_cast<unsigned>(which)},
               [&](Call& call) -> CUresult {
                 if (value == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 if (call.no_device(device)) return call.bad_device(device);
                 *value = attribute(call.s.options, which, device);
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  return enter("cuDeviceTotalMem", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (bytes == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.no_device(device)) return call.bad_device(device);
    *bytes = call.s.options.memory_bytes;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  return enter("cuDeviceComputeCapability", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (major == nullptr || minor == nullptr) {
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    }
    if (call.no_device(device)) return call.bad_device(device);
    *major = kMajor;
    *minor = kMinor;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  return enter("cuDeviceCanAccessPeer", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (can == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.no_device(device)) return call.bad_device(device);
    if (call.no_device(peer)) return call.bad_device(peer);
    *can = device != peer && call.s.options.peers ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** name) {
  if (name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *name = emulator::error_name(error);
  return *name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** string) {
  if (string == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *string = emulator::error_string(error);
  return *string == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
