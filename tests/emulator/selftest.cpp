// The emulator's own test: every rule that kvspan's tests lean on is seen to bite, through dlsym
// alone, as a client finds the library. Run with the library's path as argument.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "emulator.h"

namespace {

void* library = nullptr;
int failures = 0;

template <typename Function>
Function* find(const char* name) {
  void* at = dlsym(library, name);
  if (at == nullptr) {
    std::printf("missing symbol %s\n", name);
    std::exit(1);
  }
  return reinterpret_cast<Function*>(at);
}

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++failures;                                                         \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

#define STRING_OF(text) #text
#define NAME_OF(symbol) STRING_OF(symbol)
// The call under its exported name: cuda.h's macros give the _v2 names.
#define CU(symbol) (*find<decltype(symbol)>(NAME_OF(symbol)))
#define EMU(symbol) (*find<decltype(kvspan_emulator_##symbol)>("kvspan_emulator_" #symbol))

constexpr std::size_t kPage = std::size_t{2} << 20;

CUmemAllocationProp properties(int device = 0) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return prop;
}

CUmemAccessDesc access(int device, CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
  CUmemAccessDesc desc{};
  desc.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  desc.location.id = device;
  desc.flags = flags;
  return desc;
}

// The number of violations since the last call, which are forgotten.
unsigned long long violations() {
  const auto n = EMU(violations)();
  EMU(clear_violations)();
  return n;
}

std::string first_violation() {
  const char* text = EMU(violation)(0);
  const std::string copy = text == nullptr ? "" : text;
  EMU(clear_violations)();
  return copy;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// A context, and mapped, granted memory of n pages.
struct Fixture {
  explicit Fixture(const char* options, std::size_t n_pages = 1, bool grant = true)
      : pages(n_pages) {
    CHECK(EMU(reset)(options) == 0);
    CHECK(CU(cuInit)(0) == CUDA_SUCCESS);
    CHECK(CU(cuDevicePrimaryCtxRetain)(&context, 0) == CUDA_SUCCESS);
    CHECK(CU(cuCtxSetCurrent)(context) == CUDA_SUCCESS);
    CHECK(CU(cuMemAddressReserve)(&base, (pages + 1) * kPage, 0, 0, 0) == CUDA_SUCCESS);
    const auto prop = properties();
    for (std::size_t i = 0; i < pages; ++i) {
      CUmemGenericAllocationHandle handle = 0;
      CHECK(CU(cuMemCreate)(&handle, kPage, &prop, 0) == CUDA_SUCCESS);
      CHECK(CU(cuMemMap)(base + i * kPage, kPage, 0, handle, 0) == CUDA_SUCCESS);
      handles.push_back(handle);
    }
    const auto desc = access(0);
    if (grant && pages > 0)
      CHECK(CU(cuMemSetAccess)(base, pages * kPage, &desc, 1) == CUDA_SUCCESS);
    CHECK(CU(cuStreamCreate)(&stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS);
  }
  ~Fixture() {
    EMU(hold_streams)(0);
    CU(cuCtxSynchronize)();
    CHECK(CU(cuStreamDestroy)(stream) == CUDA_SUCCESS);
    if (pages > 0) CHECK(CU(cuMemUnmap)(base, pages * kPage) == CUDA_SUCCESS);
    for (const auto handle : handles) CHECK(CU(cuMemRelease)(handle) == CUDA_SUCCESS);
    CHECK(CU(cuMemAddressFree)(base, (handles.size() + 1) * kPage) == CUDA_SUCCESS);
    CHECK(CU(cuDevicePrimaryCtxRelease)(0) == CUDA_SUCCESS);
    while (EMU(violations)() > 0) {
      ++failures;
      std::printf("left over: %s\n", first_violation().c_str());
    }
  }
  std::size_t pages;
  CUcontext context = nullptr;
  CUdeviceptr base = 0;
  CUstream stream = nullptr;
  std::vector<CUmemGenericAllocationHandle> handles;
};

void mapping_errors() {
  Fixture f("", 2);
  const auto prop = properties();
  const auto desc = access(0);
  CUmemGenericAllocationHandle h = 0;
  CHECK(CU(cuMemCreate)(&h, kPage + 4096, &prop, 0) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemMap)(f.base + 2 * kPage + 4096, kPage, 0, f.handles[0], 0) ==
        CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemMap)(f.base + 2 * kPage, kPage, kPage, f.handles[0], 0) ==
        CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemMap)(f.base, kPage, 0, f.handles[0], 0) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemMap)(f.base + 3 * kPage, kPage, 0, f.handles[0], 0) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemSetAccess)(f.base, 3 * kPage, &desc, 1) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemUnmap)(f.base, kPage / 2) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemUnmap)(f.base + 2 * kPage, kPage) == CUDA_ERROR_INVALID_VALUE);
  CHECK(CU(cuMemAddressFree)(f.base, kPage) == CUDA_ERROR_INVALID_VALUE);
  CHECK(violations() == 0);
  CHECK(CU(cuMemAddressFree)(f.base, 3 * kPage) == CUDA_ERROR_INVALID_VALUE);
  CHECK(has(first_violation(), "live mappings"));
  CHECK(CU(cuMemCreate)(&h, kPage, &prop, 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemRelease)(h) == CUDA_SUCCESS);
  CHECK(CU(cuMemRelease)(h) == CUDA_ERROR_INVALID_VALUE);
  CHECK(has(first_violation(), "released already"));
  CHECK(CU(cuMemMap)(f.base + 2 * kPage, kPage, 0, h, 0) == CUDA_ERROR_INVALID_VALUE);
  CHECK(violations() == 1);
  // The handle of a mapping may be released first; retaining it brings the same handle back.
  CHECK(CU(cuMemRelease)(f.handles[0]) == CUDA_SUCCESS);
  CHECK(CU(cuMemRetainAllocationHandle)(&h, reinterpret_cast<void*>(f.base + 5)) == CUDA_SUCCESS);
  CHECK(h == f.handles[0]);
  kvspan_emulator_ledger_t ledger;
  EMU(ledger)(&ledger);
  CHECK(ledger.handles == 2 && ledger.mappings == 2 && ledger.reservations == 1);
}

void access_rules() {
  Fixture f("devices=2", 2, false);
  CHECK(CU(cuMemsetD8Async)(f.base, 1, 16, f.stream) == CUDA_ERROR_INVALID_VALUE);
  CHECK(has(first_violation(), "no cuMemSetAccess"));
  auto desc = access(0, CU_MEM_ACCESS_FLAGS_PROT_READ);
  CHECK(CU(cuMemSetAccess)(f.base, 2 * kPage, &desc, 1) == CUDA_SUCCESS);
  CHECK(CU(cuMemsetD8Async)(f.base, 1, 16, f.stream) == CUDA_ERROR_INVALID_VALUE);
  CHECK(has(first_violation(), "read-only"));
  unsigned long long token = 0;
  // 100 bytes before the end of what is mapped, in tiles that reach beyond it.
  CHECK(EMU(read_kernel)(f.stream, f.base + 2 * kPage - 100, 100, 3 * kPage, 5, &token) == 0);
  CHECK(CU(cuStreamSynchronize)(f.stream) == CUDA_ERROR_ILLEGAL_ADDRESS);
  CHECK(has(first_violation(), "is not mapped"));
  CHECK(EMU(kernel_result)(token, nullptr) == CUDA_ERROR_ILLEGAL_ADDRESS);
  CUcontext other = nullptr;
  CHECK(CU(cuDevicePrimaryCtxRetain)(&other, 1) == CUDA_SUCCESS);
  CHECK(CU(cuCtxSetCurrent)(other) == CUDA_SUCCESS);
  CHECK(CU(cuMemsetD8)(f.base, 1, 16) == CUDA_ERROR_INVALID_VALUE);
  CHECK(has(first_violation(), "from this device"));
  CHECK(EMU(read_kernel)(f.stream, f.base, 16, 0, 1, nullptr) == CUDA_ERROR_INVALID_HANDLE);
  CHECK(violations() == 1);
  CHECK(CU(cuCtxSetCurrent)(f.context) == CUDA_SUCCESS);
  CHECK(CU(cuDevicePrimaryCtxRelease)(1) == CUDA_SUCCESS);
}

void bytes_move() {
  Fixture f("", 2);
  std::vector<unsigned char> in(kPage + 1000), out(kPage + 1000);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(i * 7 + i / 251);
  // Across the border of two handles.
  CHECK(CU(cuMemcpyHtoDAsync)(f.base + 500, in.data(), in.size(), f.stream) == CUDA_SUCCESS);
  const auto sum = EMU(checksum)(in.data(), in.size());
  std::memset(in.data(), 0, in.size());  // pageable memory was taken at the call
  unsigned long long token = 0, seen = 0;
  CHECK(EMU(read_kernel)(f.stream, f.base + 500, in.size(), 4096, 10, &token) == 0);
  CHECK(CU(cuMemcpyDtoHAsync)(out.data(), f.base + 500, out.size(), f.stream) == CUDA_SUCCESS);
  CHECK(EMU(checksum)(out.data(), out.size()) == sum);  // to pageable memory: done at return
  CHECK(EMU(kernel_result)(token, &seen) == 0 && seen == sum);
  CHECK(CU(cuMemsetD32Async)(f.base + kPage - 4, 0x04030201, 2, f.stream) == CUDA_SUCCESS);
  CHECK(CU(cuStreamSynchronize)(f.stream) == CUDA_SUCCESS);
  unsigned char eight[8];
  CHECK(EMU(peek)(f.base + kPage - 4, eight, 8) == 0);
  CHECK(std::memcmp(eight, "\1\2\3\4\1\2\3\4", 8) == 0);
  // Two addresses of one handle are one memory.
  CHECK(CU(cuMemMap)(f.base + 2 * kPage, kPage, 0, f.handles[0], 0) == CUDA_SUCCESS);
  const auto desc = access(0);
  CHECK(CU(cuMemSetAccess)(f.base + 2 * kPage, kPage, &desc, 1) == CUDA_SUCCESS);
  CHECK(EMU(write_kernel)(f.stream, f.base + 2 * kPage, 3, 0, 1, 9) == 0);
  CHECK(CU(cuStreamSynchronize)(f.stream) == CUDA_SUCCESS);
  CHECK(EMU(peek)(f.base, eight, 3) == 0 && eight[2] == 9);
  CHECK(CU(cuMemUnmap)(f.base + 2 * kPage, kPage) == CUDA_SUCCESS);
}

void deferred_work() {
  Fixture f("hold=1", 2);
  void* pinned = nullptr;
  CHECK(CU(cuMemAllocHost)(&pinned, 64) == CUDA_SUCCESS);
  std::memset(pinned, 1, 64);
  CHECK(CU(cuMemcpyHtoDAsync)(f.base, pinned, 64, f.stream) == CUDA_SUCCESS);
  std::memset(pinned, 2, 64);  // too early: the copy reads it later
  CHECK(CU(cuStreamQuery)(f.stream) == CUDA_ERROR_NOT_READY);
  CUevent event = nullptr, start = nullptr;
  CHECK(CU(cuEventCreate)(&event, 0) == CUDA_SUCCESS);
  CHECK(CU(cuEventCreate)(&start, 0) == CUDA_SUCCESS);
  CHECK(CU(cuEventRecord)(start, f.stream) == CUDA_SUCCESS);
  CHECK(EMU(read_kernel)(f.stream, f.base, 64, 0, 2500, nullptr) == 0);
  CHECK(CU(cuEventRecord)(event, f.stream) == CUDA_SUCCESS);
  CHECK(CU(cuEventQuery)(event) == CUDA_ERROR_NOT_READY);
  // Another stream that waits for the event is waited for in turn.
  CUstream second = nullptr;
  CHECK(CU(cuStreamCreate)(&second, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS);
  CHECK(CU(cuStreamWaitEvent)(second, event, 0) == CUDA_SUCCESS);
  CHECK(EMU(read_kernel)(second, f.base + kPage, 64, 0, 10, nullptr) == 0);
  CHECK(CU(cuStreamSynchronize)(second) == CUDA_SUCCESS);
  CHECK(CU(cuEventQuery)(event) == CUDA_SUCCESS);
  float ms = 0;
  CHECK(CU(cuEventElapsedTime)(&ms, start, event) == CUDA_SUCCESS && ms > 2.49F && ms < 2.6F);
  unsigned char byte = 0;
  CHECK(EMU(peek)(f.base, &byte, 1) == 0 && byte == 2);
  // Unmapping under queued work.
  CHECK(EMU(read_kernel)(f.stream, f.base + kPage, 64, 0, 10, nullptr) == 0);
  CHECK(CU(cuMemUnmap)(f.base + kPage, kPage) == CUDA_SUCCESS);
  CHECK(has(first_violation(), "unfinished read kernel"));
  CHECK(CU(cuMemMap)(f.base + kPage, kPage, 0, f.handles[1], 0) == CUDA_SUCCESS);
  CHECK(CU(cuStreamSynchronize)(f.stream) == CUDA_ERROR_ILLEGAL_ADDRESS);
  CHECK(violations() == 0);
  CHECK(CU(cuStreamDestroy)(second) == CUDA_SUCCESS);
  CHECK(CU(cuStreamDestroy)(second) == CUDA_ERROR_INVALID_HANDLE);
  CHECK(has(first_violation(), "destroyed already"));
  CHECK(CU(cuEventDestroy)(event) == CUDA_SUCCESS);
  CHECK(CU(cuEventDestroy)(event) == CUDA_ERROR_INVALID_HANDLE);
  CHECK(violations() == 1);
  CHECK(CU(cuEventDestroy)(start) == CUDA_SUCCESS);
  CHECK(CU(cuMemFreeHost)(pinned) == CUDA_SUCCESS);
}

void legacy_stream() {
  Fixture f("hold=1");
  CUstream blocking = nullptr;
  CHECK(CU(cuStreamCreate)(&blocking, CU_STREAM_DEFAULT) == CUDA_SUCCESS);
  CHECK(EMU(write_kernel)(blocking, f.base, 8, 0, 10, 1) == 0);
  CHECK(EMU(write_kernel)(f.stream, f.base + 8, 8, 0, 10, 1) == 0);
  CHECK(EMU(write_kernel)(nullptr, f.base, 4, 0, 10, 2) == 0);
  CHECK(CU(cuStreamSynchronize)(nullptr) == CUDA_SUCCESS);
  unsigned char bytes[16];
  CHECK(EMU(peek)(f.base, bytes, 16) == 0);
  CHECK(bytes[0] == 2 && bytes[4] == 1);  // in order
  CHECK(bytes[8] == 0);                   // not waited for
  CHECK(CU(cuStreamQuery)(f.stream) == CUDA_ERROR_NOT_READY);
  CHECK(CU(cuStreamDestroy)(blocking) == CUDA_SUCCESS);
}

void sharing() {
  Fixture f("");
  CHECK(CU(cuMemsetD8)(f.base, 42, kPage) == CUDA_SUCCESS);
  int fd = -1;
  CHECK(CU(cuMemExportToShareableHandle)(
            &fd, f.handles[0], CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) == CUDA_SUCCESS);
  CUmemGenericAllocationHandle again = 0;
  CHECK(CU(cuMemImportFromShareableHandle)(
            &again, reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd)),
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(f.base + kPage, kPage, 0, again, 0) == CUDA_SUCCESS);
  unsigned char byte = 0;
  CHECK(EMU(peek)(f.base + kPage + 17, &byte, 1) == 0 && byte == 42);
  CHECK(CU(cuMemUnmap)(f.base + kPage, kPage) == CUDA_SUCCESS);
  CHECK(CU(cuMemRelease)(again) == CUDA_SUCCESS);
  close(fd);
  // After fork(2) nothing works in the child, which also leaves without a verdict.
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) std::exit(CU(cuCtxSynchronize)() == CUDA_ERROR_NOT_INITIALIZED ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
}

void limits_and_faults() {
  Fixture f("memory=8MiB,max_aliases=2,max_mappings=3", 1);
  const auto prop = properties();
  const auto desc = access(0);
  std::size_t free_bytes = 0, total = 0;
  CHECK(CU(cuMemGetInfo)(&free_bytes, &total) == CUDA_SUCCESS && free_bytes == total - kPage);
  CUmemGenericAllocationHandle h = 0;
  CHECK(CU(cuMemCreate)(&h, 8 * kPage, &prop, 0) == CUDA_ERROR_OUT_OF_MEMORY);
  CUdeviceptr more = 0;
  CHECK(CU(cuMemAddressReserve)(&more, 4 * kPage, 0, 0, 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(more, kPage, 0, f.handles[0], 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(more + kPage, kPage, 0, f.handles[0], 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(more + 2 * kPage, kPage, 0, f.handles[0], 0) == CUDA_ERROR_OUT_OF_MEMORY);
  CHECK(CU(cuMemSetAccess)(more, kPage, &desc, 1) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(f.base + kPage, kPage, 0, f.handles[0], 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemSetAccess)(more, kPage, &desc, 1) == CUDA_ERROR_OUT_OF_MEMORY);
  CHECK(CU(cuMemUnmap)(f.base + kPage, kPage) == CUDA_SUCCESS);
  CHECK(CU(cuMemUnmap)(more, 2 * kPage) == CUDA_SUCCESS);
  CHECK(CU(cuMemAddressFree)(more, 4 * kPage) == CUDA_SUCCESS);
  const auto failed = EMU(failed_calls)();
  EMU(fail)("cuMemCreate,cuMemMap", 2, CUDA_ERROR_OUT_OF_MEMORY, 1);
  CHECK(CU(cuMemCreate)(&h, kPage, &prop, 0) == CUDA_SUCCESS);
  CHECK(CU(cuMemMap)(f.base + kPage, kPage, 0, h, 0) == CUDA_ERROR_OUT_OF_MEMORY);
  CHECK(CU(cuMemRelease)(h) == CUDA_SUCCESS);
  CHECK(EMU(injected)() == 1 && EMU(failed_calls)() == failed + 1);
  CHECK(EMU(reset)("") == 1);  // the ledger is not empty
}

void lookups() {
  CHECK(EMU(reset)("driver=12020,missing=cuMemMap") == 0);
  void* at = nullptr;
  CUdriverProcAddressQueryResult status;
  auto& get = CU(cuGetProcAddress);
  CHECK(get("cuMemAlloc", &at, 12020, 0, nullptr) == CUDA_SUCCESS &&
        at == dlsym(library, "cuMemAlloc_v2"));
  CHECK(get("cuMemAlloc", &at, 13000, 0, &status) == CUDA_ERROR_INVALID_VALUE);
  CHECK(get("cuMemCreate", &at, 10000, 0, &status) == CUDA_ERROR_NOT_FOUND && at == nullptr);
  CHECK(status == CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  CHECK(get("cuMemMap", &at, 12000, 0, &status) == CUDA_ERROR_NOT_FOUND);
  CHECK(status == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  CHECK(get("cuMemcpyAsync", &at, 12000, 2, &status) == CUDA_SUCCESS);
  CHECK(at == dlsym(library, "cuMemcpyAsync_ptsz"));
  CHECK(EMU(reset)("devicez=2") == 2);
  CHECK(EMU(reset)("latency.cuMemCrate=2") == 2);
  int n = 0;
  CHECK(CU(cuDeviceGetCount)(&n) == CUDA_ERROR_NOT_INITIALIZED);
}

void virtual_time() {
  Fixture f("memory_free=1,latency.cuMemMap=2");
  EMU(set_lane)(0);
  const double begin = EMU(clock)();
  const auto prop = properties();
  CUmemGenericAllocationHandle h = 0;
  CHECK(CU(cuMemCreate)(&h, kPage, &prop, 0) == CUDA_SUCCESS);
  CHECK(EMU(clock)() == begin + 193);
  // Lane 1, at the same time: a map waits for the lock that the create holds.
  EMU(set_lane)(1);
  EMU(set_clock)(begin + 10);
  CHECK(CU(cuMemMap)(f.base + kPage, kPage, 0, h, 0) == CUDA_SUCCESS);
  CHECK(EMU(clock)() == begin + 195 && EMU(lock_wait)() == 183);
  EMU(set_lane)(0);
  CHECK(EMU(read_kernel)(f.stream, f.base, 64, 0, 1000, nullptr) == 0);
  CUevent event = nullptr;
  CHECK(CU(cuEventCreate)(&event, 0) == CUDA_SUCCESS);
  CHECK(CU(cuEventRecord)(event, f.stream) == CUDA_SUCCESS);
  CHECK(CU(cuEventQuery)(event) == CUDA_ERROR_NOT_READY);
  EMU(advance)(990);
  CHECK(CU(cuEventQuery)(event) == CUDA_ERROR_NOT_READY);
  EMU(advance)(20);
  CHECK(CU(cuEventQuery)(event) == CUDA_SUCCESS);
  // Lane 1 is still at a time when the kernel runs.
  EMU(set_lane)(1);
  const auto desc = access(0, CU_MEM_ACCESS_FLAGS_PROT_READ);
  CHECK(CU(cuMemSetAccess)(f.base, kPage, &desc, 1) == CUDA_SUCCESS);
  CHECK(has(first_violation(), "unfinished read kernel"));
  CHECK(CU(cuMemUnmap)(f.base + kPage, kPage) == CUDA_SUCCESS);
  CHECK(CU(cuMemRelease)(h) == CUDA_SUCCESS);
  CHECK(CU(cuEventDestroy)(event) == CUDA_SUCCESS);
  EMU(set_lane)(-1);
}

void million_mappings() {
  using Seconds = std::chrono::duration<double>;
  const auto begin = std::chrono::steady_clock::now();
  {
    Fixture f("memory_free=1,memory=64TiB,quirks=0", 0);
    constexpr std::size_t n = 1'000'000;
    CUdeviceptr base = 0;
    CHECK(CU(cuMemAddressReserve)(&base, n * kPage, 0, 0, 0) == CUDA_SUCCESS);
    auto& create = CU(cuMemCreate);
    auto& map = CU(cuMemMap);
    auto& set = CU(cuMemSetAccess);
    auto& release = CU(cuMemRelease);
    const auto prop = properties();
    const auto desc = access(0);
    bool good = true;
    for (std::size_t i = 0; i < n; ++i) {
      CUmemGenericAllocationHandle h = 0;
      good &= create(&h, kPage, &prop, 0) == CUDA_SUCCESS;
      good &= map(base + i * kPage, kPage, 0, h, 0) == CUDA_SUCCESS;
      good &= set(base + i * kPage, kPage, &desc, 1) == CUDA_SUCCESS;
      good &= release(h) == CUDA_SUCCESS;
    }
    CHECK(good);
    CHECK(CU(cuMemUnmap)(base, n * kPage) == CUDA_SUCCESS);
    CHECK(CU(cuMemAddressFree)(base, n * kPage) == CUDA_SUCCESS);
    CHECK(EMU(handles)("cuMemUnmap") == n);
  }
  std::printf("a million mappings: %.2f s\n",
              Seconds(std::chrono::steady_clock::now() - begin).count());
}

void many_threads() {
  Fixture f("", 8);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&f, t] {
      CHECK(CU(cuCtxSetCurrent)(f.context) == CUDA_SUCCESS);
      CUstream stream = nullptr;
      CHECK(CU(cuStreamCreate)(&stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS);
      const CUdeviceptr at = f.base + 2 * t * kPage;
      for (unsigned i = 0; i < 50; ++i) {
        unsigned char out[256];
        CHECK(CU(cuMemsetD8Async)(at, static_cast<unsigned char>(i + t), kPage, stream) == 0);
        CHECK(CU(cuMemcpyDtoDAsync)(at + kPage, at, kPage, stream) == 0);
        CHECK(CU(cuMemcpyDtoHAsync)(out, at + kPage, sizeof out, stream) == 0);
        CHECK(CU(cuStreamSynchronize)(stream) == 0);
        CHECK(out[255] == static_cast<unsigned char>(i + t));
      }
      CHECK(CU(cuStreamDestroy)(stream) == CUDA_SUCCESS);
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || (library = dlopen(argv[1], RTLD_NOW)) == nullptr) {
    std::printf("usage: %s libcuda.so.1 [leak]\n", argv[0]);
    return 2;
  }
  if (argc > 2) {  // leaves a context behind: the exit status must be 86
    CU(cuInit)(0);
    CUcontext context = nullptr;
    CU(cuDevicePrimaryCtxRetain)(&context, 0);
    return 0;
  }
  mapping_errors();
  access_rules();
  bytes_move();
  deferred_work();
  legacy_stream();
  sharing();
  limits_and_faults();
  lookups();
  virtual_time();
  million_mappings();
  many_threads();
  std::printf("%s\n", failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}
