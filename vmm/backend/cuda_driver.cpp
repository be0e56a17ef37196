#include "backend/cuda_driver.hpp"

#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <type_traits>

namespace kvspan::cuda {

namespace {

// What the driver reads and writes of ours: a header with other layouts must not compile.
static_assert(sizeof(CUdeviceptr) == 8 && sizeof(CUmemGenericAllocationHandle) == 8);
static_assert(sizeof(CUmemLocation) == 8 && sizeof(CUmemAccessDesc) == 12);
static_assert(offsetof(CUmemAccessDesc, flags) == 8);
static_assert(sizeof(CUmemAllocationProp) == 32);
static_assert(offsetof(CUmemAllocationProp, requestedHandleTypes) == 4);
static_assert(offsetof(CUmemAllocationProp, location) == 8);
static_assert(offsetof(CUmemAllocationProp, win32HandleMetaData) == 16);

// cuGetProcAddress came with 11.3; 11.4 (R470) is the first long-term branch that has it.
constexpr int kLeastVersion = 11040;
constexpr const char* kAdvice = "; update NVIDIA's driver, or use device=\"cpu\", which needs none";

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void* open_library() {
  // Never closed: threads of the driver may run in it until the process ends.
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    throw DriverError(
        "dlopen", "libcuda.so.1",
        std::string("there is no CUDA driver: ") + (why ? why : "not found") + kAdvice);
  }
  return library;
}

template <class F>
F symbol(void* library, const char* name) {
  return reinterpret_cast<F>(dlsym(library, name));
}

// cuGetProcAddress, which 12.0 gave one more argument under a new name.
class Lookup {
 public:
  Lookup(void* library, int version)
      : v2_(symbol<PFN_cuGetProcAddress_v12000>(library, "cuGetProcAddress_v2")),
        v1_(symbol<PFN_cuGetProcAddress_v11030>(library, "cuGetProcAddress")),
        version_(version) {}

  bool works() const { return v2_ != nullptr || v1_ != nullptr; }

  template <class F>
  void operator()(F& function, const char* name, int since) const {
    void* found = nullptr;
    const CUresult result = v2_ != nullptr
                                ? v2_(name, &found, since, CU_GET_PROC_ADDRESS_DEFAULT, nullptr)
                                : v1_(name, &found, since, CU_GET_PROC_ADDRESS_DEFAULT);
    if (result != CUDA_SUCCESS || found == nullptr) {
      throw DriverError("cuGetProcAddress", name,
                        "the CUDA driver (version " + version_text(version_) + ") lacks " + name +
                            " of CUDA " + version_text(since) + kAdvice);
    }
    function = reinterpret_cast<F>(found);
  }

 private:
  const PFN_cuGetProcAddress_v12000 v2_;
  const PFN_cuGetProcAddress_v11030 v1_;
  const int version_;
};

std::unique_ptr<Driver> load() {
  void* const library = open_library();
  int version = 0;
  const auto get_version = symbol<CUresult (*)(int*)>(library, "cuDriverGetVersion");
  if (get_version != nullptr) get_version(&version);
  const Lookup look_up(library, version);
  if (version < kLeastVersion || !look_up.works()) {
    throw DriverError("cuDriverGetVersion", "too old",
                      "the CUDA driver is of version " + version_text(version) + ", and " +
                          version_text(kLeastVersion) + " is the oldest that can be used" +
                          kAdvice);
  }

  auto d = std::make_unique<Driver>();
// The table's signature is the one that the header has for that version.
#define KVSPAN_LOOK_UP(name, since)                                        \
  static_assert(std::is_same_v<decltype(d->name), PFN_##name##_v##since>); \
  look_up(d->name, #name, since)
  KVSPAN_LOOK_UP(cuInit, 2000);
  KVSPAN_LOOK_UP(cuDriverGetVersion, 2020);
  KVSPAN_LOOK_UP(cuGetErrorName, 6000);
  KVSPAN_LOOK_UP(cuGetErrorString, 6000);
  KVSPAN_LOOK_UP(cuDeviceGet, 2000);
  KVSPAN_LOOK_UP(cuDeviceGetCount, 2000);
  KVSPAN_LOOK_UP(cuDeviceGetAttribute, 2000);
  KVSPAN_LOOK_UP(cuDeviceCanAccessPeer, 4000);
  KVSPAN_LOOK_UP(cuDevicePrimaryCtxRetain, 7000);
  KVSPAN_LOOK_UP(cuDevicePrimaryCtxRelease, 11000);
  KVSPAN_LOOK_UP(cuCtxGetCurrent, 4000);
  KVSPAN_LOOK_UP(cuCtxPushCurrent, 4000);
  KVSPAN_LOOK_UP(cuCtxPopCurrent, 4000);
  KVSPAN_LOOK_UP(cuCtxSynchronize, 2000);
  KVSPAN_LOOK_UP(cuMemGetInfo, 3020);
  KVSPAN_LOOK_UP(cuMemGetAllocationGranularity, 10020);
  KVSPAN_LOOK_UP(cuMemAddressReserve, 10020);
  KVSPAN_LOOK_UP(cuMemAddressFree, 10020);
  KVSPAN_LOOK_UP(cuMemCreate, 10020);
  KVSPAN_LOOK_UP(cuMemRelease, 10020);
  KVSPAN_LOOK_UP(cuMemMap, 10020);
  KVSPAN_LOOK_UP(cuMemUnmap, 10020);
  KVSPAN_LOOK_UP(cuMemSetAccess, 10020);
  KVSPAN_LOOK_UP(cuMemExportToShareableHandle, 10020);
  KVSPAN_LOOK_UP(cuMemImportFromShareableHandle, 10020);
  KVSPAN_LOOK_UP(cuMemAlloc, 3020);
  KVSPAN_LOOK_UP(cuMemFree, 3020);
  KVSPAN_LOOK_UP(cuMemHostAlloc, 2020);
  KVSPAN_LOOK_UP(cuMemFreeHost, 2000);
  KVSPAN_LOOK_UP(cuMemcpyHtoDAsync, 3020);
  KVSPAN_LOOK_UP(cuMemcpyDtoDAsync, 3020);
  KVSPAN_LOOK_UP(cuMemsetD8Async, 3020);
  KVSPAN_LOOK_UP(cuStreamCreate, 2000);
  KVSPAN_LOOK_UP(cuStreamDestroy, 4000);
  KVSPAN_LOOK_UP(cuStreamSynchronize, 2000);
  KVSPAN_LOOK_UP(cuStreamWaitEvent, 3020);
  KVSPAN_LOOK_UP(cuStreamIsCapturing, 10000);
  KVSPAN_LOOK_UP(cuThreadExchangeStreamCaptureMode, 10010);
  KVSPAN_LOOK_UP(cuEventCreate, 2000);
  KVSPAN_LOOK_UP(cuEventRecord, 2000);
  KVSPAN_LOOK_UP(cuEventQuery, 2000);
  KVSPAN_LOOK_UP(cuEventSynchronize, 2000);
  KVSPAN_LOOK_UP(cuEventDestroy, 4000);
#undef KVSPAN_LOOK_UP
  return d;
}

}  // namespace

const Driver& driver() {
  static std::mutex mutex;  // guards `loaded`, which is never destroyed: see open_library
  static const Driver* loaded = nullptr;
  const std::scoped_lock lock(mutex);
  if (loaded == nullptr) loaded = load().release();
  return *loaded;
}

std::string name_of(const Driver& driver, CUresult result) {
  const char* name = nullptr;
  if (driver.cuGetErrorName == nullptr || driver.cuGetErrorName(result, &name) != CUDA_SUCCESS ||
      name == nullptr) {
    return "CUDA error " + std::to_string(static_cast<int>(result));
  }
  return name;
}

void throw_error(const Driver& driver, const char* call, CUresult result,
                 const std::string& detail) {
  throw DriverError(call, name_of(driver, result), detail);
}

}  // namespace kvspan::cuda
