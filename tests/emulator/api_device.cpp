// Driver calls about the driver itself, devices and contexts (primary contexts only).
#include <algorithm>
#include <cstring>

#include "call.h"

using emulator::Call;
using emulator::Context;
using emulator::enter;
using emulator::number;
using emulator::text;

namespace {

bool no_device(const Call& call, CUdevice device) {
  return device < 0 || device >= call.s.options.devices;
}

CUresult bad_device(Call& call, CUdevice device) {
  return call.misuse(CUDA_ERROR_INVALID_DEVICE, text("there is no device %d", device));
}

Context* context_of(Call& call, CUcontext handle) {
  for (auto& context : call.s.contexts) {
    if (reinterpret_cast<CUcontext>(&context) == handle) return &context;
  }
  return nullptr;
}

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
      return 8;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
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

CUresult primary_release(CUdevice device) {
  return enter("cuDevicePrimaryCtxRelease", Call::kInit, {static_cast<unsigned>(device)},
               [&](Call& call) -> CUresult {
                 if (no_device(call, device)) return bad_device(call, device);
                 auto& context = call.s.contexts[static_cast<std::size_t>(device)];
                 if (context.references == 0) {
                   return call.violation(CUDA_ERROR_INVALID_CONTEXT,
                                         text("the context of device %d is not retained", device));
                 }
                 if (context.references == 1) {
                   call.s.streams.wait(call.lock, &context);
                   if (context.references == 1) {
                     call.s.report_leaks("at cuDevicePrimaryCtxRelease", &context);
                     call.s.streams.destroy_of(&context);
                   }
                 }
                 --context.references;
                 return CUDA_SUCCESS;
               });
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
                 if (no_device(call, ordinal)) return bad_device(call, ordinal);
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
    if (no_device(call, device)) return bad_device(call, device);
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
    if (no_device(call, device)) return bad_device(call, device);
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
                 if (no_device(call, device)) return bad_device(call, device);
                 *value = attribute(call.s.options, which, device);
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  return enter("cuDeviceTotalMem", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (bytes == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (no_device(call, device)) return bad_device(call, device);
    *bytes = call.s.options.memory_bytes;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  return enter("cuDeviceCanAccessPeer", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (can == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (no_device(call, device)) return bad_device(call, device);
    if (no_device(call, peer)) return bad_device(call, peer);
    *can = device != peer && call.s.options.peers ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return enter("cuDevicePrimaryCtxRetain", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (context == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (no_device(call, device)) return bad_device(call, device);
    auto& primary = call.s.contexts[static_cast<std::size_t>(device)];
    ++primary.references;
    *context = reinterpret_cast<CUcontext>(&primary);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice device) { return primary_release(device); }

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
  return enter("cuDevicePrimaryCtxGetState", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (flags == nullptr || active == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (no_device(call, device)) return bad_device(call, device);
    const auto& primary = call.s.contexts[static_cast<std::size_t>(device)];
    *flags = primary.flags;
    *active = primary.references > 0 ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned int flags) {
  return enter("cuDevicePrimaryCtxSetFlags", Call::kInit, {flags}, [&](Call& call) -> CUresult {
    if (no_device(call, device)) return bad_device(call, device);
    call.s.contexts[static_cast<std::size_t>(device)].flags = flags;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext handle) {
  return enter("cuCtxSetCurrent", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = context_of(call, handle);
    if (handle != nullptr && (context == nullptr || context->references == 0))
      return call.violation(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    emulator::set_current(context);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* handle) {
  return enter("cuCtxGetCurrent", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (handle == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *handle = reinterpret_cast<CUcontext>(call.context);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext handle) {
  return enter("cuCtxPushCurrent", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = context_of(call, handle);
    if (context == nullptr || context->references == 0)
      return call.violation(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    emulator::push_current(context);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext* handle) {
  return enter("cuCtxPopCurrent", Call::kInit, {}, [&](Call& call) -> CUresult {
    Context* popped = nullptr;
    if (!emulator::pop_current(&popped))
      return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current");
    if (handle != nullptr) *handle = reinterpret_cast<CUcontext>(popped);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  return enter("cuCtxGetDevice", Call::kContext, {}, [&](Call& call) -> CUresult {
    if (device == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *device = call.context->device;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetDevice_v2(CUdevice* device, CUcontext handle) {
  if (handle == nullptr) return cuCtxGetDevice(device);
  return enter("cuCtxGetDevice", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = context_of(call, handle);
    if (device == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (context == nullptr || context->references == 0)
      return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    *device = context->device;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetFlags(unsigned int* flags) {
  return enter("cuCtxGetFlags", Call::kContext, {}, [&](Call& call) -> CUresult {
    if (flags == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *flags = call.context->flags;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetId(CUcontext handle, unsigned long long* id) {
  return enter("cuCtxGetId", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = handle == nullptr ? call.context : context_of(call, handle);
    if (id == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (context == nullptr || context->references == 0)
      return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    *id = static_cast<unsigned long long>(context->device) + 1;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxSynchronize(void) {
  return enter("cuCtxSynchronize", Call::kContext, {}, [&](Call& call) -> CUresult {
    call.charge(0);
    return call.s.streams.wait(call.lock, call.context);
  });
}

CUresult CUDAAPI cuCtxSynchronize_v2(CUcontext handle) {
  if (handle == nullptr) return cuCtxSynchronize();
  return enter("cuCtxSynchronize", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = context_of(call, handle);
    if (context == nullptr || context->references == 0)
      return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    call.charge(0);
    return call.s.streams.wait(call.lock, context);
  });
}

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return enter("cuCtxGetStreamPriorityRange", Call::kContext, {}, [&](Call&) -> CUresult {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxEnablePeerAccess(CUcontext handle, unsigned int flags) {
  return enter("cuCtxEnablePeerAccess", Call::kContext, {number(handle), flags},
               [&](Call& call) -> CUresult {
                 Context* context = context_of(call, handle);
                 if (flags != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0");
                 if (context == nullptr || context->references == 0 || context == call.context)
                   return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "not another active context");
                 if (!call.s.options.peers) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
                 return CUDA_SUCCESS;  // cuMemAlloc memory of peers stays inaccessible here
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
