// cuGetProcAddress: which names there are, since which CUDA version, and which variant a version
// gets. The versions are those under which NVIDIA's cuda-bindings ask for the names.
#include <array>
#include <string_view>

#include "call.h"

using emulator::Call;
using emulator::enter;

// Variants that cuda.h does not declare; defined in the api_*.cpp files.
#undef cuDeviceGetUuid
#undef cuEventElapsedTime
extern "C" {
CUresult CUDAAPI cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device);
CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device);
CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end);
CUresult CUDAAPI cuMemcpy_ptds(CUdeviceptr to, CUdeviceptr from, size_t n);
CUresult CUDAAPI cuMemcpyHtoD_v2_ptds(CUdeviceptr to, const void* from, size_t n);
CUresult CUDAAPI cuMemcpyDtoH_v2_ptds(void* to, CUdeviceptr from, size_t n);
CUresult CUDAAPI cuMemcpyDtoD_v2_ptds(CUdeviceptr to, CUdeviceptr from, size_t n);
CUresult CUDAAPI cuMemcpyAsync_ptsz(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream);
CUresult CUDAAPI cuMemcpyHtoDAsync_v2_ptsz(CUdeviceptr to, const void* from, size_t n, CUstream);
CUresult CUDAAPI cuMemcpyDtoHAsync_v2_ptsz(void* to, CUdeviceptr from, size_t n, CUstream stream);
CUresult CUDAAPI cuMemcpyDtoDAsync_v2_ptsz(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream);
CUresult CUDAAPI cuMemsetD8_v2_ptds(CUdeviceptr to, unsigned char value, size_t n);
CUresult CUDAAPI cuMemsetD16_v2_ptds(CUdeviceptr to, unsigned short value, size_t n);
CUresult CUDAAPI cuMemsetD32_v2_ptds(CUdeviceptr to, unsigned int value, size_t n);
CUresult CUDAAPI cuMemsetD8Async_ptsz(CUdeviceptr to, unsigned char value, size_t n, CUstream);
CUresult CUDAAPI cuMemsetD16Async_ptsz(CUdeviceptr to, unsigned short value, size_t n, CUstream);
CUresult CUDAAPI cuMemsetD32Async_ptsz(CUdeviceptr to, unsigned int value, size_t n, CUstream);
CUresult CUDAAPI cuStreamSynchronize_ptsz(CUstream stream);
CUresult CUDAAPI cuStreamQuery_ptsz(CUstream stream);
CUresult CUDAAPI cuStreamWaitEvent_ptsz(CUstream stream, CUevent event, unsigned int flags);
CUresult CUDAAPI cuLaunchHostFunc_ptsz(CUstream stream, CUhostFn function, void* data);
CUresult CUDAAPI cuEventRecord_ptsz(CUevent event, CUstream stream);
CUresult CUDAAPI cuEventRecordWithFlags_ptsz(CUevent event, CUstream stream, unsigned int flags);
CUresult CUDAAPI cuStreamGetFlags_ptsz(CUstream stream, unsigned int* flags);
CUresult CUDAAPI cuStreamGetPriority_ptsz(CUstream stream, int* priority);
CUresult CUDAAPI cuStreamGetId_ptsz(CUstream stream, unsigned long long* id);
CUresult CUDAAPI cuStreamGetDevice_ptsz(CUstream stream, CUdevice* device);
CUresult CUDAAPI cuStreamIsCapturing_ptsz(CUstream stream, CUstreamCaptureStatus* status);
CUresult CUDAAPI cuStreamGetCtx_ptsz(CUstream stream, CUcontext* context);
CUresult CUDAAPI cuStreamGetCtx_v2_ptsz(CUstream stream, CUcontext* context, CUgreenCtx* green);
}
#undef cuGetProcAddress
EMULATOR_EXPORT CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** function, int version,
                                                  cuuint64_t flags);

namespace {

struct Entry {
  std::string_view name;
  int since;
  void* function;
  void* per_thread;  // the variant for flags = 2, where there is one
};

template <typename Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

#define PLAIN(name, since) \
  Entry { #name, since, address(&name), nullptr }
#define AS(name, since, symbol) \
  Entry { name, since, address(&symbol), nullptr }
#define STREAM(name, since, symbol, per_thread) \
  Entry { name, since, address(&symbol), address(&per_thread) }

const auto& table() {
  static const std::array entries = {
      PLAIN(cuInit, 2000),
      PLAIN(cuDriverGetVersion, 2020),
      PLAIN(cuGetErrorName, 6000),
      PLAIN(cuGetErrorString, 6000),
      AS("cuGetProcAddress", 11030, cuGetProcAddress),
      AS("cuGetProcAddress", 12000, cuGetProcAddress_v2),
      PLAIN(cuDeviceGet, 2000),
      PLAIN(cuDeviceGetCount, 2000),
      PLAIN(cuDeviceGetName, 2000),
      AS("cuDeviceGetUuid", 9020, cuDeviceGetUuid),
      AS("cuDeviceGetUuid", 11040, cuDeviceGetUuid_v2),
      PLAIN(cuDeviceGetAttribute, 2000),
      AS("cuDeviceTotalMem", 3020, cuDeviceTotalMem_v2),
      PLAIN(cuDeviceCanAccessPeer, 4000),
      PLAIN(cuDevicePrimaryCtxRetain, 7000),
      AS("cuDevicePrimaryCtxRelease", 11000, cuDevicePrimaryCtxRelease_v2),
      AS("cuDevicePrimaryCtxSetFlags", 11000, cuDevicePrimaryCtxSetFlags_v2),
      PLAIN(cuDevicePrimaryCtxGetState, 7000),
      AS("cuCtxCreate", 3020, cuCtxCreate_v2),
      AS("cuCtxDestroy", 4000, cuCtxDestroy_v2),
      PLAIN(cuCtxSetCurrent, 4000),
      PLAIN(cuCtxGetCurrent, 4000),
      AS("cuCtxPushCurrent", 4000, cuCtxPushCurrent_v2),
      AS("cuCtxPopCurrent", 4000, cuCtxPopCurrent_v2),
      PLAIN(cuCtxGetDevice, 2000),
      AS("cuCtxGetDevice", 13000, cuCtxGetDevice_v2),
      PLAIN(cuCtxGetFlags, 7000),
      PLAIN(cuCtxGetId, 12000),
      PLAIN(cuCtxSynchronize, 2000),
      AS("cuCtxSynchronize", 13000, cuCtxSynchronize_v2),
      PLAIN(cuCtxGetStreamPriorityRange, 5050),
      PLAIN(cuCtxEnablePeerAccess, 4000),
      AS("cuMemGetInfo", 3020, cuMemGetInfo_v2),
      AS("cuMemAlloc", 3020, cuMemAlloc_v2),
      AS("cuMemFree", 3020, cuMemFree_v2),
      AS("cuMemGetAddressRange", 3020, cuMemGetAddressRange_v2),
      AS("cuMemAllocHost", 3020, cuMemAllocHost_v2),
      PLAIN(cuMemFreeHost, 2000),
      PLAIN(cuMemHostAlloc, 2020),
      AS("cuMemHostRegister", 6050, cuMemHostRegister_v2),
      PLAIN(cuMemHostUnregister, 4000),
      AS("cuMemHostGetDevicePointer", 3020, cuMemHostGetDevicePointer_v2),
      PLAIN(cuMemHostGetFlags, 2030),
      PLAIN(cuMemGetAllocationGranularity, 10020),
      PLAIN(cuMemAddressReserve, 10020),
      PLAIN(cuMemAddressFree, 10020),
      PLAIN(cuMemCreate, 10020),
      PLAIN(cuMemRelease, 10020),
      PLAIN(cuMemMap, 10020),
      PLAIN(cuMemUnmap, 10020),
      PLAIN(cuMemSetAccess, 10020),
      PLAIN(cuMemGetAccess, 10020),
      PLAIN(cuMemExportToShareableHandle, 10020),
      PLAIN(cuMemImportFromShareableHandle, 10020),
      PLAIN(cuMemGetAllocationPropertiesFromHandle, 10020),
      PLAIN(cuMemRetainAllocationHandle, 11000),
      PLAIN(cuPointerGetAttribute, 4000),
      PLAIN(cuPointerGetAttributes, 7000),
      STREAM("cuMemcpy", 4000, cuMemcpy, cuMemcpy_ptds),
      STREAM("cuMemcpyHtoD", 3020, cuMemcpyHtoD_v2, cuMemcpyHtoD_v2_ptds),
      STREAM("cuMemcpyDtoH", 3020, cuMemcpyDtoH_v2, cuMemcpyDtoH_v2_ptds),
      STREAM("cuMemcpyDtoD", 3020, cuMemcpyDtoD_v2, cuMemcpyDtoD_v2_ptds),
      STREAM("cuMemcpyAsync", 4000, cuMemcpyAsync, cuMemcpyAsync_ptsz),
      STREAM("cuMemcpyHtoDAsync", 3020, cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync_v2_ptsz),
      STREAM("cuMemcpyDtoHAsync", 3020, cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync_v2_ptsz),
      STREAM("cuMemcpyDtoDAsync", 3020, cuMemcpyDtoDAsync_v2, cuMemcpyDtoDAsync_v2_ptsz),
      STREAM("cuMemsetD8", 3020, cuMemsetD8_v2, cuMemsetD8_v2_ptds),
      STREAM("cuMemsetD16", 3020, cuMemsetD16_v2, cuMemsetD16_v2_ptds),
      STREAM("cuMemsetD32", 3020, cuMemsetD32_v2, cuMemsetD32_v2_ptds),
      STREAM("cuMemsetD8Async", 3020, cuMemsetD8Async, cuMemsetD8Async_ptsz),
      STREAM("cuMemsetD16Async", 3020, cuMemsetD16Async, cuMemsetD16Async_ptsz),
      STREAM("cuMemsetD32Async", 3020, cuMemsetD32Async, cuMemsetD32Async_ptsz),
      PLAIN(cuStreamCreate, 2000),
      PLAIN(cuStreamCreateWithPriority, 5050),
      AS("cuStreamDestroy", 4000, cuStreamDestroy_v2),
      STREAM("cuStreamSynchronize", 2000, cuStreamSynchronize, cuStreamSynchronize_ptsz),
      STREAM("cuStreamQuery", 2000, cuStreamQuery, cuStreamQuery_ptsz),
      STREAM("cuStreamWaitEvent", 3020, cuStreamWaitEvent, cuStreamWaitEvent_ptsz),
      STREAM("cuStreamGetFlags", 5050, cuStreamGetFlags, cuStreamGetFlags_ptsz),
      STREAM("cuStreamGetPriority", 5050, cuStreamGetPriority, cuStreamGetPriority_ptsz),
      STREAM("cuStreamGetId", 12000, cuStreamGetId, cuStreamGetId_ptsz),
      STREAM("cuStreamGetDevice", 12080, cuStreamGetDevice, cuStreamGetDevice_ptsz),
      STREAM("cuStreamGetCtx", 9020, cuStreamGetCtx, cuStreamGetCtx_ptsz),
      STREAM("cuStreamGetCtx", 12050, cuStreamGetCtx_v2, cuStreamGetCtx_v2_ptsz),
      STREAM("cuStreamIsCapturing", 10000, cuStreamIsCapturing, cuStreamIsCapturing_ptsz),
      PLAIN(cuThreadExchangeStreamCaptureMode, 10010),
      STREAM("cuLaunchHostFunc", 10000, cuLaunchHostFunc, cuLaunchHostFunc_ptsz),
      PLAIN(cuEventCreate, 2000),
      STREAM("cuEventRecord", 2000, cuEventRecord, cuEventRecord_ptsz),
      STREAM("cuEventRecordWithFlags", 11010, cuEventRecordWithFlags, cuEventRecordWithFlags_ptsz),
      PLAIN(cuEventQuery, 2000),
      PLAIN(cuEventSynchronize, 2000),
      AS("cuEventDestroy", 4000, cuEventDestroy_v2),
      AS("cuEventElapsedTime", 2000, cuEventElapsedTime),
      AS("cuEventElapsedTime", 12080, cuEventElapsedTime_v2),
  };
  return entries;
}

CUresult look_up(const char* symbol, void** function, int version, cuuint64_t flags,
                 CUdriverProcAddressQueryResult* status) {
  return enter("cuGetProcAddress", Call::kNothing,
               {static_cast<unsigned>(version), static_cast<std::uint64_t>(flags)},
               [&](Call& call) -> CUresult {
                 if (symbol == nullptr || function == nullptr || flags > 2)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or unknown flags");
                 *function = nullptr;
                 // No misuse: clients that are newer than the driver ask in this way.
                 if (version > call.s.options.driver) return CUDA_ERROR_INVALID_VALUE;
                 bool exists = false;
                 for (const auto& entry : table()) {
                   if (entry.name != symbol || call.s.options.missing.contains(entry.name))
                     continue;
                   exists = true;
                   if (entry.since > version) continue;  // later rows are newer variants
                   const bool per_thread = flags == CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM &&
                                           entry.per_thread != nullptr;
                   *function = per_thread ? entry.per_thread : entry.function;
                 }
                 if (status != nullptr) {
                   *status = *function != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS
                             : exists             ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                                                  : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
                 }
                 return *function != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
               });
}

}  // namespace

EMULATOR_EXPORT CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** function, int version,
                                                  cuuint64_t flags) {
  return look_up(symbol, function, version, flags, nullptr);
}

CUresult CUDAAPI cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                     cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
  return look_up(symbol, function, version, flags, status);
}
