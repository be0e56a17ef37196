#include "backend/cuda_driver.hpp"

#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <mutex>

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

constexpr int kLeastVersion = 11030;  // the first with cuGetProcAddress
constexpr const char* kAdvice = "; update NVIDIA's driver, or use device=\"cpu\", which needs none";

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// cuGetProcAddress as it was in 11.3: the later one with a query result is asked for only through
// it, and not needed.
using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t);

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

class Lookup {
 public:
  Lookup(GetProcAddress get, int version) : get_(get), version_(version) {}

  template <class F>
  void operator()(F& function, const char* name, int since) const {
    void* found = nullptr;
    const CUresult result = get_(name, &found, since, CU_GET_PROC_ADDRESS_DEFAULT);
    if (result != CUDA_SUCCESS || found == nullptr) {
      throw DriverError("cuGetProcAddress", name,
                        "the CUDA driver (version " + version_text(version_) + ") lacks " + name +
                            " of CUDA " + version_text(since) + kAdvice);
    }
    function = reinterpret_cast<F>(found);
  }

 private:
  const GetProcAddress get_;
  const int version_;
};

std::unique_ptr<Driver> load() {
  void* const library = open_library();
  int version = 0;
  const auto get_version = symbol<CUresult (*)(int*)>(library, "cuDriverGetVersion");
  if (get_version != nullptr) get_version(&version);
  const auto get = symbol<GetProcAddress>(library, "cuGetProcAddress");
  if (version < kLeastVersion || get == nullptr) {
    throw DriverError("cuDriverGetVersion", "too old",
                      "the CUDA driver is of version " + version_text(version) + ", and " +
                          version_text(kLeastVersion) + " is the oldest that can be used" +
                          kAdvice);
  }

  auto d = std::make_unique<Driver>();
  const Lookup look_up(get, version);
#define KVSPAN_LOOK_UP(name, since) look_up(d->name, #name, since)
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
