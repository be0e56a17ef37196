// The CUDA backend on the driver emulator: the contract, every call of it failing at every
// position, and what streams and the driver's limits ask for. An emulator: nothing here is a GPU
// result.
#include <dlfcn.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <vector>

#include "backend/contract.hpp"
#include "backend/cuda_backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "emulator/emulator.h"

namespace kvspan::test {

namespace {

template <class F>
F* control(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  void* const found = library == nullptr ? nullptr : dlsym(library, name);
  BOOST_REQUIRE_MESSAGE(found != nullptr, "the emulator's libcuda.so.1 is not on LD_LIBRARY_PATH");
  return reinterpret_cast<F*>(found);
}
#define EMULATOR(name) control<decltype(kvspan_emulator_##name)>("kvspan_emulator_" #name)

constexpr int kInjected = 999;  // CUDA_ERROR_UNKNOWN

CudaOptions options(Bytes page_size, Bytes capacity) {
  return {.page_size = page_size, .capacity = capacity, .largest_class = SizeClass(2)};
}

std::unique_ptr<Backend> cuda(Bytes page_size, Bytes capacity) {
  return make_cuda_backend(options(page_size, capacity));
}

// Device memory is not the host's to read.
std::uint8_t peek(Backend&, Address at) {
  std::uint8_t value = 0;
  BOOST_REQUIRE(EMULATOR(peek)(at.value, &value, 1) == 0);
  return value;
}

const bool contract = add_contract({"cuda on the emulator, 2 MiB", cuda, kMiB * 2, peek}) &&
                      add_contract({"cuda on the emulator, 4 MiB", cuda, kMiB * 4, peek});

void require_clean() {
  BOOST_TEST(EMULATOR(violations)() == 0u);
  for (unsigned long long i = 0; i < EMULATOR(violations)(); ++i) {
    BOOST_TEST_MESSAGE(EMULATOR(violation)(i));
  }
  kvspan_emulator_ledger_t now{};
  EMULATOR(ledger)(&now);
  BOOST_TEST(now.reservations == 0u);
  BOOST_TEST(now.handles == 0u);
  BOOST_TEST(now.mappings == 0u);
  BOOST_TEST(now.events == 0u);
  BOOST_TEST(now.streams == 0u);
  BOOST_TEST(now.contexts == 0u);
  BOOST_TEST(now.pinned_allocations == 0u);
  BOOST_TEST(now.device_allocations == 0u);
}

// The life of some frames, with everything that a backend does. What was made is given back also
// where something throws, as the layers above do.
void live() {
  const auto b = cuda(kMiB * 2, kMiB * 32);
  const auto mirror = b->make_mirror(Bytes(64));
  static_cast<std::uint8_t*>(mirror->host())[3] = 9;
  mirror->publish(b->own_stream());
  const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
  const FrameRun run{FrameId(SizeClass(0), 1), 3};
  const VirtualRange mapped{range.base, kMiB * 6};
  bool is_created = false, is_mapped = false;
  const auto clean_up = [&] {
    if (is_mapped) b->unmap(mapped, run.count);
    if (is_created) b->release(run);
    b->free(range);
  };
  try {
    b->create(run);
    is_created = true;
    b->map(range.base, run, Access::read_write);
    is_mapped = true;
    b->fill(range.base, 7, kMiB * 2, {});
    b->copy(range.base + kMiB * 2, range.base, kMiB * 2, {});
    const Fence fence = b->record_fence({});
    b->order_after(b->own_stream(), fence);
    b->wait(fence);
    BOOST_TEST(b->is_passed(fence));
    BOOST_TEST(peek(*b, range.base + kMiB * 3) == 7);
    b->set_access(mapped, Access::read);
    b->unmap(mapped, run.count);
    is_mapped = false;
  } catch (...) {
    EMULATOR(fail)(nullptr, 0, 0, 0);
    b->finish();
    clean_up();
    throw;
  }
  clean_up();
}

struct Clean {
  Clean() { BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0); }
  ~Clean() { require_clean(); }
};

}  // namespace

BOOST_FIXTURE_TEST_SUITE(cuda_backend, Clean)

BOOST_AUTO_TEST_CASE(a_life_leaves_nothing_behind) { live(); }

BOOST_AUTO_TEST_CASE(every_call_may_fail_and_is_taken_back) {
  // Calls that take something away cannot be made good: they are reported, and leak by design.
  const char* const names =
      "cuDeviceGetCount,cuDeviceGet,cuDeviceGetAttribute,cuDevicePrimaryCtxRetain,"
      "cuMemGetAllocationGranularity,cuStreamCreate,cuMemGetInfo,cuMemAddressReserve,cuMemCreate,"
      "cuMemMap,cuMemSetAccess,cuMemAlloc,cuMemHostAlloc,cuMemcpyHtoDAsync,cuMemcpyDtoDAsync,"
      "cuMemsetD8Async,cuEventCreate,cuEventRecord,cuStreamWaitEvent";
  for (const int error : {kInjected, 2 /* CUDA_ERROR_OUT_OF_MEMORY */}) {
    unsigned long long n = 1;
    for (; n < 200; ++n) {
      const unsigned long long before = EMULATOR(injected)();
      EMULATOR(fail)(names, n, error, 1);
      bool has_thrown = false;
      try {
        live();
      } catch (const Error&) {
        has_thrown = true;
      }
      const bool has_fired = EMULATOR(injected)() > before;
      EMULATOR(fail)(nullptr, 0, 0, 0);
      BOOST_TEST_CONTEXT("call " << n << ", error " << error) {
        BOOST_TEST(has_thrown == has_fired);
        require_clean();
      }
      if (!has_fired) break;
    }
    BOOST_TEST(n > 20u);
    BOOST_TEST(n < 200u);
  }
}

BOOST_AUTO_TEST_CASE(a_mirror_is_not_overwritten_before_its_copy) {
  const auto b = cuda(kMiB * 2, kMiB * 32);
  const auto mirror = b->make_mirror(Bytes(4));
  EMULATOR(hold_streams)(1);
  auto* const host = static_cast<std::uint8_t*>(mirror->host());
  for (std::uint8_t i = 1; i <= 5; ++i) {
    host[0] = i;
    mirror->publish({});
  }
  host[0] = 77;  // not published
  EMULATOR(hold_streams)(0);
  b->finish();
  BOOST_TEST(peek(*b, mirror->device()) == 5);
}

BOOST_AUTO_TEST_CASE(fences_order_streams) {
  const auto b = cuda(kMiB * 2, kMiB * 32);
  EMULATOR(hold_streams)(1);
  const auto mirror = b->make_mirror(Bytes(4));
  const Fence fence = b->record_fence(b->own_stream());
  BOOST_TEST(b->is_passed(Fence{}));
  b->order_after({}, fence);
  EMULATOR(hold_streams)(0);
  b->wait(fence);
  BOOST_TEST(b->is_passed(fence));
}

BOOST_AUTO_TEST_CASE(the_budget_of_mappings_is_an_error_that_says_so) {
  CudaOptions o = options(kMiB * 2, kMiB * 32);
  o.max_mappings = 2;
  const auto b = make_cuda_backend(o);
  const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
  const FrameRun run{FrameId(SizeClass(0), 0), 3};
  b->create(run);
  BOOST_CHECK_THROW(b->map(range.base, run, Access::read_write), CapacityError);
  b->map(range.base, {run.first, 2}, Access::read_write);
  b->unmap({range.base, kMiB * 4}, 2);
  b->release(run);
  b->free(range);
}

BOOST_AUTO_TEST_CASE(what_cannot_be_is_refused) {
  BOOST_CHECK_THROW(cuda(kMiB, kMiB * 32), InvalidArgument);     // under the granularity
  BOOST_CHECK_THROW(cuda(kMiB * 2, kMiB * 3), InvalidArgument);  // no multiple of the page
  CudaOptions other = options(kMiB * 2, kMiB * 32);
  other.ordinal = 9;
  BOOST_CHECK_THROW(make_cuda_backend(other), InvalidArgument);
  CudaOptions own_peer = options(kMiB * 2, kMiB * 32);
  own_peer.peers = {0};
  BOOST_CHECK_THROW(make_cuda_backend(own_peer), InvalidArgument);
}

BOOST_AUTO_TEST_CASE(memory_that_is_short_is_an_answer) {
  BOOST_REQUIRE(EMULATOR(reset)("memory=512MiB") == 0);
  {
    const auto b = cuda(kMiB * 2, kMiB * 1024);
    BOOST_CHECK_THROW(b->create({FrameId(SizeClass(0), 0), 200}), OutOfMemory);
    b->create({FrameId(SizeClass(0), 0), 4});
    b->release({FrameId(SizeClass(0), 0), 4});
  }
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
