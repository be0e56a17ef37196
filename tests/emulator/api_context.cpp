// Driver calls about contexts: the primary ones, and those that clients of the older sort create.
#include "call.h"

using emulator::Call;
using emulator::Context;
using emulator::enter;
using emulator::number;
using emulator::text;

namespace {

CUresult primary_release(CUdevice device) {
  return enter("cuDevicePrimaryCtxRelease", Call::kInit, {static_cast<unsigned>(device)},
               [&](Call& call) -> CUresult {
                 if (call.no_device(device)) return call.bad_device(device);
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

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return enter("cuDevicePrimaryCtxRetain", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (context == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.no_device(device)) return call.bad_device(device);
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
    if (call.no_device(device)) return call.bad_device(device);
    const auto& primary = call.s.contexts[static_cast<std::size_t>(device)];
    *flags = primary.flags;
    *active = primary.references > 0 ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned int flags) {
  return enter("cuDevicePrimaryCtxSetFlags", Call::kInit, {flags}, [&](Call& call) -> CUresult {
    if (call.no_device(device)) return call.bad_device(device);
    call.s.contexts[static_cast<std::size_t>(device)].flags = flags;
    return CUDA_SUCCESS;
  });
}

// Not declared by today's cuda.h, whose cuCtxCreate is another version's.
EMULATOR_EXPORT CUresult CUDAAPI cuCtxCreate_v2(CUcontext* handle, unsigned int flags,
                                                CUdevice device) {
  return enter("cuCtxCreate", Call::kInit, {flags}, [&](Call& call) -> CUresult {
    if (handle == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.no_device(device)) return call.bad_device(device);
    Context& context = call.s.created_contexts.emplace_back(Context{device, 1, flags});
    emulator::push_current(&context);
    *handle = reinterpret_cast<CUcontext>(&context);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxDestroy_v2(CUcontext handle) {
  return enter("cuCtxDestroy", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* const context = call.s.context_of(handle);
    if (context == nullptr || context->references == 0)
      return call.violation(CUDA_ERROR_INVALID_CONTEXT, "not an active context");
    if (context == &call.s.contexts[static_cast<std::size_t>(context->device)])
      return call.violation(CUDA_ERROR_INVALID_CONTEXT, "a primary context is released instead");
    const CUresult result = call.s.streams.wait(call.lock, context);
    call.s.streams.destroy_of(context);
    context->references = 0;
    Context* popped = nullptr;
    if (call.context == context) emulator::pop_current(&popped);
    return result;
  });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext handle) {
  return enter("cuCtxSetCurrent", Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Context* context = call.s.context_of(handle);
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
    Context* context = call.s.context_of(handle);
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
    Context* context = call.s.context_of(handle);
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
    Context* context = handle == nullptr ? call.context : call.s.context_of(handle);
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
    Context* context = call.s.context_of(handle);
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
                 Context* context = call.s.context_of(handle);
                 if (flags != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0");
                 if (context == nullptr || context->references == 0 || context == call.context)
                   return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "not another active context");
                 if (!call.s.options.peers) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
                 return CUDA_SUCCESS;  // cuMemAlloc memory of peers stays inaccessible here
               });
}
