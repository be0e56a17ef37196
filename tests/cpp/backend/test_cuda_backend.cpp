// The CUDA backend on the driver emulator: the contract, every call failing at every position, and
// what streams, limits and forks ask for. Nothing here is a GPU result; test_gpu.cpp is for a GPU.
#include <sys/mman.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "backend/child.hpp"
#include "backend/contract.hpp"
#include "backend/cuda_backend.hpp"
#include "backend/cuda_rig.hpp"
#include "backend/exec_self.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "emulator/emulator.h"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kMiB * 2;
constexpr int kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kUnknown = 999;    // CUDA_ERROR_UNKNOWN

#define EMULATOR(name) function<decltype(kvspan_emulator_##name)>("kvspan_emulator_" #name)

boost::test_tools::assertion_result on_the_emulator(boost::unit_test::test_unit_id) {
  boost::test_tools::assertion_result result(is_emulated());
  result.message() << "the driver is not the emulator";
  return result;
}

void require_clean() {
  if (!is_emulated()) return;
  for (unsigned long long i = 0; i < EMULATOR(violations)(); ++i) {
    BOOST_ERROR(EMULATOR(violation)(i));
  }
  kvspan_emulator_ledger_t now{};
  EMULATOR(ledger)(&now);
  BOOST_TEST(now.reservations == 0u);
  BOOST_TEST(now.handles == 0u);
  BOOST_TEST(now.handle_references == 0u);
  BOOST_TEST(now.mappings == 0u);
  BOOST_TEST(now.events == 0u);
  BOOST_TEST(now.streams == 0u);
  BOOST_TEST(now.contexts == 0u);
  BOOST_TEST(now.pinned_allocations == 0u);
  BOOST_TEST(now.device_allocations == 0u);
  BOOST_TEST(now.pending_operations == 0u);
  BOOST_TEST(now.device_bytes == 0u);
}

const bool contract = add_contract({"cuda, 2 MiB", [](Bytes p, Bytes c) { return cuda(p, c); },
                                    kMiB * 2, peek, require_clean}) &&
                      add_contract({"cuda, 4 MiB", [](Bytes p, Bytes c) { return cuda(p, c); },
                                    kMiB * 4, peek, require_clean});

void fail(const char* names, unsigned long long n = 1, int error = kUnknown,
          unsigned long long times = 1) {
  EMULATOR(fail)(names, n, error, times);
}
void fail_no_more() { fail(nullptr, 0, 0, 0); }

// The life of some frames, with everything that a backend does. What was made is given back also
// where something throws, as the layers above do. The failures that the backend has reported.
std::uint64_t live() {
  const auto b = cuda();
  auto mirror = b->make_mirror(Bytes(64));
  static_cast<std::uint8_t*>(mirror->host())[3] = 9;
  mirror->publish(b->own_stream());
  const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
  const FrameRun run = frames(1, 3);
  const VirtualRange mapped{range.base, kMiB * 6};
  bool is_created = false, is_imported = false, is_mapped = false;
  ExportedFrame exported;
  const auto clean_up = [&] {
    if (exported.fd >= 0) close(exported.fd);
    if (is_mapped) b->unmap(mapped, run.count);
    if (is_imported) b->release(frames(9, 1));
    if (is_created) b->release(run);
    b->free(range);
  };
  try {
    b->create(run);
    is_created = true;
    exported = b->export_frame(run.first);
    b->import_frame(FrameId(SizeClass(0), 9), exported);
    is_imported = true;
    b->map(range.base, run, Access::read_write);
    is_mapped = true;
    b->fill(range.base, 7, kPage, {});
    b->copy(range.base + kPage, range.base, kPage, {});
    const Fence fence = b->record_fence({});
    b->order_after(b->own_stream(), fence);
    b->wait(fence);
    BOOST_TEST(b->is_passed(fence));
    std::uint8_t byte = 0;
    EMULATOR(peek)((range.base + kMiB * 3).value, &byte, 1);
    BOOST_TEST(byte == 7);
    b->set_access(mapped, Access::read);
    b->unmap(mapped, run.count);
    is_mapped = false;
  } catch (...) {
    fail_no_more();
    b->finish();
    clean_up();
    throw;
  }
  clean_up();
  BOOST_TEST(b->mappings() == 0u);
  mirror.reset();
  return b->failure_count();
}

struct Clean {
  Clean() { BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0); }
  ~Clean() { require_clean(); }
};

#define ON_THE_EMULATOR *boost::unit_test::precondition(on_the_emulator)

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_backend, ON_THE_EMULATOR)

BOOST_FIXTURE_TEST_CASE(a_life_leaves_nothing_behind, Clean) { BOOST_TEST(live() == 0u); }

// ---- failures ----

// Calls that take something away cannot be made good: see `failed_releases`.
constexpr const char* kCallsThatThrow =
    "cuInit,cuDeviceGetCount,cuDeviceGet,cuDeviceGetAttribute,cuDevicePrimaryCtxRetain,"
    "cuMemGetAllocationGranularity,cuStreamCreate,cuMemGetInfo,cuMemAddressReserve,cuMemCreate,"
    "cuMemMap,cuMemSetAccess,cuMemAlloc,cuMemHostAlloc,cuMemcpyHtoDAsync,cuMemcpyDtoDAsync,"
    "cuMemsetD8Async,cuEventCreate,cuEventRecord,cuEventSynchronize,cuStreamWaitEvent,"
    "cuStreamIsCapturing,"
    "cuMemExportToShareableHandle,cuMemImportFromShareableHandle";

BOOST_FIXTURE_TEST_CASE(every_call_may_fail_and_is_taken_back, Clean) {
  for (const int error : {kUnknown, kOutOfMemory}) {
    unsigned long long n = 1;
    for (; n < 200; ++n) {
      const unsigned long long before = EMULATOR(injected)();
      fail(kCallsThatThrow, n, error);
      bool has_thrown = false;
      std::uint64_t n_reported = 0;
      try {
        n_reported = live();
      } catch (const Error&) {
        has_thrown = true;
      }
      const bool has_fired = EMULATOR(injected)() > before;
      fail_no_more();
      BOOST_TEST_CONTEXT("call " << n << ", error " << error) {
        // Either it is told, or it was a wait of a mirror on its way out, which is reported.
        BOOST_TEST((has_thrown || n_reported > 0) == has_fired);
        require_clean();
      }
      if (!has_fired) break;
    }
    BOOST_TEST(n > 40u);
    BOOST_TEST(n < 200u);
  }
}

BOOST_FIXTURE_TEST_CASE(each_call_has_its_type_of_error, Clean) {
  const auto b = cuda();
  const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
  b->create(frames(0, 2));
  const auto is_named = [](auto body, const std::string& a, const std::string& c) {
    return throws_naming<DriverError>(body, a) && throws_naming<DriverError>(body, c);
  };
  const auto with = [&](const char* name, int error, auto body) {
    return [=] {
      fail(name, 1, error);
      body();
    };
  };
  const auto create = [&] { b->create(frames(4, 2)); };
  const auto map = [&] { b->map(range.base, frames(0, 2), Access::read_write); };
  BOOST_TEST(is_named(with("cuMemCreate", kUnknown, create), "cuMemCreate", "CUDA_ERROR_UNKNOWN"));
  BOOST_TEST(is_named(with("cuMemMap", kUnknown, map), "cuMemMap", "CUDA_ERROR_UNKNOWN"));
  BOOST_TEST(
      is_named(with("cuMemSetAccess", kUnknown, map), "cuMemSetAccess", "CUDA_ERROR_UNKNOWN"));
  try {
    fail("cuMemCreate", 2, kOutOfMemory);
    create();
    BOOST_ERROR("created");
  } catch (const OutOfMemory& e) {
    BOOST_TEST(e.requested().value == (kPage * 2).value);
    BOOST_TEST(e.free().value > 0u);
  }
  // Nothing is left of them.
  kvspan_emulator_ledger_t now{};
  EMULATOR(ledger)(&now);
  BOOST_TEST(now.handles == 2u);
  create();
  b->release(frames(4, 2));
  // Page tables that are full are a limit of the machine, not memory that a caller could free.
  for (const char* name : {"cuMemMap", "cuMemSetAccess"}) {
    BOOST_TEST(throws_naming<CapacityError>(with(name, kOutOfMemory, map), "2 live"));
  }
  BOOST_CHECK_THROW(with("cuMemAlloc", kOutOfMemory, [&] { b->make_mirror(Bytes(64)); })(),
                    OutOfMemory);
  BOOST_CHECK_THROW(with("cuMemHostAlloc", kOutOfMemory, [&] { b->make_mirror(Bytes(64)); })(),
                    OutOfMemory);
  const auto reserve = [&] { b->reserve(kPage, Unmapped::fault); };
  BOOST_CHECK_THROW(with("cuMemAddressReserve", kOutOfMemory, reserve)(), CapacityError);
  // What could not be unmapped is still there, and goes the next time.
  map();
  BOOST_CHECK_THROW(with("cuMemUnmap", kUnknown, [&] { b->unmap({range.base, kPage * 2}, 2); })(),
                    DriverError);
  BOOST_TEST(b->mappings() == 2u);
  b->fill(range.base, 1, kPage * 2, {});
  b->finish();
  b->unmap({range.base, kPage * 2}, 2);
  b->release(frames(0, 2));
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

BOOST_FIXTURE_TEST_CASE(nothing_is_done_in_another_context, Clean) {
  const auto b = cuda();
  const VirtualRange range = b->reserve(kPage * 2, Unmapped::fault);
  const auto refused = [&](auto body) {
    for (const char* name :
         {"cuCtxGetCurrent", "cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"}) {
      fail(name);
      BOOST_CHECK_THROW(body(), DriverError);
    }
  };
  refused([&] { b->reserve(kPage, Unmapped::fault); });
  refused([&] { b->create(frames(0, 1)); });
  refused([&] { b->memory_info(); });
  refused([&] { b->record_fence({}); });
  refused([&] { b->make_mirror(Bytes(4)); });
  b->create(frames(0, 1));
  refused([&] { b->map(range.base, frames(0, 1), Access::read); });
  b->release(frames(0, 1));
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

BOOST_FIXTURE_TEST_CASE(a_fence_that_cannot_be_asked_is_not_passed, Clean) {
  const auto b = cuda();
  const Fence fence = b->record_fence({});
  b->finish();
  fail("cuEventQuery");
  BOOST_TEST(!b->is_passed(fence));
  BOOST_TEST(b->failure_count() == 1u);
  BOOST_TEST(b->is_passed(fence));
  BOOST_TEST(b->failure_count() == 1u);
}

// What a release could not do is reported and leaks: in a process of its own, for what has leaked
// cannot be cleared away.
BOOST_AUTO_TEST_CASE(failed_releases) {
  for (const char* name : {"cuMemRelease", "cuMemAddressFree", "cuEventDestroy", "cuStreamDestroy",
                           "cuMemFree", "cuMemFreeHost", "cuDevicePrimaryCtxRelease",
                           "cuCtxPopCurrent", "cuCtxSynchronize", "cuStreamSynchronize"}) {
    BOOST_TEST_CONTEXT(name) { BOOST_TEST(run_in_new_process("failed_release", {name}) == 0); }
  }
}

// ---- streams ----

BOOST_FIXTURE_TEST_CASE(a_mirror_is_not_overwritten_before_its_copy, Clean) {
  const auto b = cuda();
  const auto mirror = b->make_mirror(Bytes(4));
  BOOST_TEST(peek(*b, mirror->device()) == 0);
  EMULATOR(hold_streams)(1);
  auto* const host = static_cast<std::uint8_t*>(mirror->host());
  // What a kernel behind each publication sees, though the host has gone on.
  const UserContext context;
  std::vector<unsigned long long> tokens;
  for (std::uint8_t i = 1; i <= 30; ++i) {  // several times around the ring
    host[0] = i;
    mirror->publish({});
    tokens.emplace_back();
    BOOST_REQUIRE(
        EMULATOR(read_kernel)(nullptr, mirror->device().value, 1, 0, 1.0, &tokens.back()) == 0);
    host[0] = 77;  // not published
  }
  EMULATOR(hold_streams)(0);
  b->finish();
  for (std::uint8_t i = 1; i <= 30; ++i) {
    unsigned long long seen = 0;
    BOOST_REQUIRE(EMULATOR(kernel_result)(tokens[i - 1u], &seen) == 0);
    BOOST_TEST(seen == EMULATOR(checksum)(&i, 1));
  }
  BOOST_TEST(peek(*b, mirror->device()) == 30);
}

BOOST_FIXTURE_TEST_CASE(a_mirror_outlives_its_backend, Clean) {
  auto b = cuda();
  auto mirror = b->make_mirror(Bytes(4));
  b.reset();
  static_cast<std::uint8_t*>(mirror->host())[0] = 5;
  mirror->publish({});
  std::uint8_t seen = 0;
  EMULATOR(hold_streams)(0);
  while (EMULATOR(peek)(mirror->device().value, &seen, 1) == 0 && seen != 5) usleep(100);
  BOOST_TEST(seen == 5);
}

BOOST_FIXTURE_TEST_CASE(mirrors_use_memory_again_behind_its_readers, Clean) {
  const auto b = cuda();
  const UserContext context;
  auto first = b->make_mirror(Bytes(12));
  const Address at = first->device();
  first.reset();
  b->finish();
  first = b->make_mirror(Bytes(64));  // as large, rounded up
  BOOST_TEST(first->device().value == at.value);
  static_cast<std::uint8_t*>(first->host())[0] = 5;
  EMULATOR(hold_streams)(1);
  first->publish({});
  unsigned long long token = 0, seen = 0;
  BOOST_REQUIRE(EMULATOR(read_kernel)(nullptr, at.value, 1, 0, 1.0, &token) == 0);
  const unsigned long long calls = EMULATOR(calls)("cuMemFree") + EMULATOR(calls)("cuMemFreeHost");
  first.reset();  // the kernel has not run
  const auto second = b->make_mirror(Bytes(12));
  BOOST_TEST(second->device().value != at.value);
  EMULATOR(hold_streams)(0);
  b->finish();
  BOOST_REQUIRE(EMULATOR(kernel_result)(token, &seen) == 0);
  const std::uint8_t five = 5;
  BOOST_TEST(seen == EMULATOR(checksum)(&five, 1));
  BOOST_TEST(b->make_mirror(Bytes(12))->device().value == at.value);
  BOOST_TEST(EMULATOR(calls)("cuMemFree") + EMULATOR(calls)("cuMemFreeHost") == calls);
  BOOST_TEST(b->failure_count() == 0u);
}

BOOST_FIXTURE_TEST_CASE(fences_are_of_their_stream, Clean) {
  const auto b = cuda();
  EMULATOR(hold_streams)(1);
  const VirtualRange range = b->reserve(kPage, Unmapped::fault);
  b->create(frames(0, 1));
  b->map(range.base, frames(0, 1), Access::read_write);
  b->fill(range.base, 1, kPage, {});
  const Fence first = b->record_fence({});
  BOOST_TEST(!b->is_passed(first));
  b->order_after(b->own_stream(), first);
  b->fill(range.base, 2, kPage, b->own_stream());
  const Fence second = b->record_fence(b->own_stream());
  BOOST_TEST(!b->is_passed(second));
  b->wait(second);  // which takes the first with it
  BOOST_TEST(b->is_passed(first));
  BOOST_TEST(b->is_passed(second));
  BOOST_TEST(peek(*b, range.base) == 2);
  b->unmap(range, 1);
  b->release(frames(0, 1));
  b->free(range);
}

BOOST_FIXTURE_TEST_CASE(fences_that_nobody_asks_for_use_few_events, Clean) {
  const auto b = cuda();
  kvspan_emulator_ledger_t now{};
  for (int i = 0; i < 2000; ++i) {
    b->record_fence({});
    if (i % 16 == 0) b->finish();
  }
  EMULATOR(ledger)(&now);
  BOOST_TEST(now.events < 64u);
  // One stream that is stuck does not keep the others' events.
  EMULATOR(hold_streams)(1);
  const Fence held = b->record_fence(b->own_stream());
  BOOST_TEST(!b->is_passed(held));
  EMULATOR(hold_streams)(0);
  b->finish();
  BOOST_TEST(b->is_passed(held));
  BOOST_TEST(b->is_passed(Fence{1}));  // forgotten long ago
}

// A stream of somebody else's that is recorded into a graph for as long as this lives.
class Captured {
 public:
  explicit Captured(int mode, unsigned flags = 1 /* CU_STREAM_NON_BLOCKING */) {
    BOOST_REQUIRE(function<int(void**, unsigned)>("cuStreamCreate")(&stream_, flags) == 0);
    BOOST_REQUIRE(EMULATOR(begin_capture)(stream_, mode) == 0);
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  ~Captured() {
    EMULATOR(end_capture)();
    function<int(void*)>("cuStreamDestroy_v2")(stream_);
  }
  Stream get() const { return {reinterpret_cast<std::uintptr_t>(stream_)}; }

 private:
  void* stream_ = nullptr;
};

constexpr int kGlobal = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL, and torch.cuda.graph's default

BOOST_FIXTURE_TEST_CASE(a_capture_is_not_spoilt, Clean) {
  const auto b = cuda();
  const UserContext context;
  const Captured captured(kGlobal);
  BOOST_TEST(live() == 0u);  // by the capturing thread, and by others; a violation would be told
  std::thread other([] { BOOST_TEST(live() == 0u); });
  other.join();
  int mode = 2;  // the thread's own mode is as it was
  BOOST_TEST(function<int(int*)>("cuThreadExchangeStreamCaptureMode")(&mode) == 0);
  BOOST_TEST(mode == kGlobal);
  BOOST_TEST(function<int(int*)>("cuThreadExchangeStreamCaptureMode")(&mode) == 0);
}

BOOST_FIXTURE_TEST_CASE(nothing_is_queued_on_a_stream_that_is_captured, Clean) {
  const auto b = cuda();
  const UserContext context;
  const auto mirror = b->make_mirror(Bytes(4));
  const VirtualRange range = b->reserve(kPage, Unmapped::fault);
  b->create(frames(0, 1));
  b->map(range.base, frames(0, 1), Access::read_write);
  EMULATOR(hold_streams)(1);
  b->fill(range.base, 1, kPage, b->own_stream());
  const Fence fence = b->record_fence(b->own_stream());
  const auto refused = [&](Stream stream) {
    const auto is_named = [](auto body) {
      return throws_naming<InvalidArgument>(body, "captured into a CUDA graph");
    };
    BOOST_TEST(is_named([&] { b->record_fence(stream); }));
    BOOST_TEST(is_named([&] { b->order_after(stream, fence); }));
    BOOST_TEST(is_named([&] { b->copy(range.base, range.base + kMiB, kMiB, stream); }));
    BOOST_TEST(is_named([&] { b->fill(range.base, 1, kPage, stream); }));
    BOOST_TEST(is_named([&] { mirror->publish(stream); }));
  };
  {
    const Captured captured(kGlobal);
    refused(captured.get());
    static_cast<void>(b->record_fence({}));  // the default stream has nothing to do with it,
  }
  {
    const Captured captured(kGlobal, 0);
    refused({});  // unless the captured one is blocking
  }
  EMULATOR(hold_streams)(0);
  b->wait(fence);
  b->unmap(range, 1);
  b->release(frames(0, 1));
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

// ---- limits and arguments ----

BOOST_FIXTURE_TEST_CASE(the_budget_of_mappings_is_an_error_that_says_so, Clean) {
  CudaOptions o = options(kPage, kMiB * 32);
  o.max_mappings = 2;
  const auto b = make_cuda_backend(o);
  const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
  b->create(frames(0, 2));
  b->create(frames(2, 1));
  const auto too_many = [&] { b->map(range.base, frames(0, 3), Access::read_write); };
  BOOST_TEST(throws_naming<CapacityError>(too_many, "max_mappings is 2"));
  BOOST_TEST(throws_naming<CapacityError>(too_many, "page_size"));
  b->map(range.base, frames(0, 2), Access::read_write);
  const auto one_more = [&] { b->map(range.base + kMiB * 4, frames(2, 1), Access::read); };
  BOOST_TEST(throws_naming<CapacityError>(one_more, "2 are mapped"));
  b->unmap({range.base, kMiB * 4}, 2);
  one_more();
  b->unmap({range.base + kMiB * 4, kPage}, 1);
  b->release(frames(0, 3));
  b->free(range);
}

BOOST_AUTO_TEST_CASE(the_drivers_own_limit_is_an_error_and_is_taken_back) {
  BOOST_REQUIRE(EMULATOR(reset)("max_mappings=3") == 0);
  {
    const auto b = cuda();
    const VirtualRange range = b->reserve(kMiB * 16, Unmapped::fault);
    b->create(frames(0, 3));
    b->create(frames(3, 3));
    b->map(range.base, frames(0, 2), Access::read_write);
    const auto too_many = [&] { b->map(range.base + kMiB * 4, frames(2, 2), Access::read); };
    BOOST_TEST(throws_naming<CapacityError>(too_many, "cuMemSetAccess"));
    BOOST_TEST(b->mappings() == 2u);
    b->map(range.base + kMiB * 4, frames(2, 1), Access::read);
    b->unmap({range.base, kMiB * 6}, 3);
    b->release(frames(0, 6));
    b->free(range);
  }
  require_clean();
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

BOOST_AUTO_TEST_CASE(memory_that_is_short_is_an_answer) {
  BOOST_REQUIRE(EMULATOR(reset)("memory=512MiB") == 0);
  {
    const auto b = cuda(kPage, kMiB * 512);
    const std::uint64_t before = b->memory_info().available.value;
    BOOST_TEST(before == (kMiB * 256).value);  // the rest is kept for others
    BOOST_CHECK_THROW(b->create(frames(0, 200)), OutOfMemory);
    b->create(frames(0, 4));
    BOOST_TEST(b->memory_info().available.value == before - (kPage * 4).value);
    b->release(frames(0, 4));
    BOOST_TEST(b->memory_info().available.value == before);
  }
  require_clean();
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

BOOST_FIXTURE_TEST_CASE(what_cannot_be_is_refused, Clean) {
  const auto refused = [](auto change, const std::string& part) {
    CudaOptions o = options(kPage, kMiB * 32);
    change(o);
    return throws_naming<InvalidArgument>([&] { make_cuda_backend(o); }, part);
  };
  BOOST_TEST(refused([](CudaOptions& o) { o.page_size = kMiB; }, "from 2 MiB"));
  BOOST_TEST(refused([](CudaOptions& o) { o.page_size = kMiB * 6; }, "power of two"));
  BOOST_TEST(refused([](CudaOptions& o) { o.capacity = kMiB * 3; }, "multiple"));
  BOOST_TEST(refused([](CudaOptions& o) { o.largest_class = SizeClass(16); }, "at most 15"));
  BOOST_TEST(refused([](CudaOptions& o) { o.ordinal = 9; }, "CUDA_VISIBLE_DEVICES"));
  BOOST_TEST(refused([](CudaOptions& o) { o.peers = {0}; }, "peer"));
  BOOST_TEST(refused([](CudaOptions& o) { o.peers = {1}; }, "peer"));
  CudaOptions o = options(kPage, kMiB * 32);
  o.is_shareable = false;
  const auto b = make_cuda_backend(o);
  b->create(frames(0, 1));
  BOOST_TEST(throws_naming<InvalidArgument>([&] { b->export_frame(frames(0, 1).first); },
                                            "shareable=True"));
  b->release(frames(0, 1));
}

BOOST_AUTO_TEST_CASE(the_page_size_may_be_left_to_the_driver) {
  BOOST_REQUIRE(EMULATOR(reset)("granularity=2MiB,recommended=4MiB") == 0);
  BOOST_TEST(cuda(Bytes(0), kMiB * 32)->traits().page_size.value == (kMiB * 4).value);
  require_clean();
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

BOOST_AUTO_TEST_CASE(peers_may_read_and_write) {
  BOOST_REQUIRE(EMULATOR(reset)("devices=2") == 0);
  {
    CudaOptions o = options(kPage, kMiB * 32);
    o.peers = {1};
    const auto b = make_cuda_backend(o);
    const VirtualRange range = b->reserve(kPage, Unmapped::fault);
    b->create(frames(0, 1));
    b->map(range.base, frames(0, 1), Access::read);
    struct Location {
      int type, id;
    };
    for (const int device : {0, 1}) {
      unsigned long long flags = 0;
      const Location location{1 /* CU_MEM_LOCATION_TYPE_DEVICE */, device};
      BOOST_REQUIRE(function<int(unsigned long long*, const Location*, unsigned long long)>(
                        "cuMemGetAccess")(&flags, &location, range.base.value) == 0);
      BOOST_TEST(flags == 1u);  // CU_MEM_ACCESS_FLAGS_PROT_READ
    }
    b->unmap(range, 1);
    b->release(frames(0, 1));
    b->free(range);
  }
  require_clean();
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

// ---- processes ----

// From now on the driver's code is not there to be run.
void remove_driver() {
  std::ifstream maps("/proc/self/maps");
  bool is_found = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libcuda") == std::string::npos || line.find("r-xp") == std::string::npos) {
      continue;
    }
    const std::uintptr_t begin = std::stoull(line, nullptr, 16);
    const std::uintptr_t end = std::stoull(line.substr(line.find('-') + 1), nullptr, 16);
    is_found = mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_NONE) == 0;
  }
  expect(is_found, "the driver's code was not found");
}

BOOST_FIXTURE_TEST_CASE(a_fork_calls_nothing, Clean) {
  auto b = cuda();
  auto mirror = b->make_mirror(Bytes(4));
  const VirtualRange range = b->reserve(kPage, Unmapped::fault);
  b->create(frames(0, 1));
  const Fence fence = b->record_fence({});
  BOOST_TEST(run_in_child([&] {
               remove_driver();
               expect(!b->usable(), "the child's backend is usable");
               const auto refused = [&](auto body) {
                 return throws_naming<ReleasedError>(body, "fork(2)");
               };
               expect(refused([&] { b->create(frames(1, 1)); }), "create");
               expect(refused([&] { b->reserve(kPage, Unmapped::fault); }), "reserve");
               expect(refused([&] { b->wait(fence); }), "wait");
               static_cast<void>(b->is_passed(fence));
               b->finish();
               b->release(frames(0, 1));
               mirror.reset();
               b.reset();
             }) == 0);
  BOOST_TEST(b->usable());
  b->release(frames(0, 1));
  b->free(range);
}

BOOST_AUTO_TEST_CASE(drivers_that_cannot_be_used_are_told_apart) {
  const auto refused = [](const std::vector<std::string>& environment,
                          const std::vector<std::string>& parts) {
    return run_in_new_process("no_driver", parts, -1, environment) == 0;
  };
  BOOST_TEST(refused({"LD_LIBRARY_PATH=/nonexistent"},
                     {"no CUDA driver", "libcuda.so.1", "device=\"cpu\""}));
  BOOST_TEST(refused({"KVSPAN_EMULATOR=driver=11020"},
                     {"version 11.2", "11.4", "update NVIDIA's driver"}));
  BOOST_TEST(refused({"KVSPAN_EMULATOR=missing=cuMemMap"}, {"lacks cuMemMap", "13.0", "update"}));
  BOOST_TEST(refused({"KVSPAN_EMULATOR=devices=0"}, {"CUDA_ERROR_NO_DEVICE", "device=\"cpu\""}));
}

BOOST_AUTO_TEST_CASE(the_oldest_driver_will_do) {
  BOOST_REQUIRE(EMULATOR(reset)("driver=11040") == 0);
  BOOST_TEST(live() == 0u);
  require_clean();
  BOOST_REQUIRE(EMULATOR(reset)(nullptr) == 0);
}

BOOST_AUTO_TEST_SUITE_END()

// Run only by name, in processes that the tests above start.

BOOST_AUTO_TEST_CASE(failed_release, *boost::unit_test::disabled()) {
  const std::string name = process_arguments().at(0);
  EMULATOR(expect)("leak:");
  auto b = cuda();
  auto mirror = b->make_mirror(Bytes(64));
  const VirtualRange range = b->reserve(kPage, Unmapped::fault);
  // The others are called when the backend has gone, and nobody is left to be told.
  const bool is_seen_by_backend = name == "cuMemRelease" || name == "cuMemAddressFree" ||
                                  name == "cuCtxPopCurrent" || name == "cuCtxSynchronize" ||
                                  name == "cuStreamSynchronize";
  if (name == "cuStreamSynchronize") {  // the last resort, where no fence can be recorded
    b->create(frames(0, 1));
    fail("cuStreamSynchronize");
    fail("cuEventRecord");
    BOOST_CHECK_THROW(mirror->publish({}), DriverError);
  } else {
    b->create(frames(0, 1));
    if (is_seen_by_backend) fail(name.c_str());
  }
  b->release(frames(0, 1));
  b->finish();
  mirror.reset();
  b->free(range);
  BOOST_TEST((b->failure_count() >= 1u) == is_seen_by_backend);
  BOOST_TEST(b->failure_count() <= 1u);
  if (!is_seen_by_backend) fail(name.c_str());
  b.reset();
}

BOOST_AUTO_TEST_CASE(no_driver, *boost::unit_test::disabled()) {
  for (int attempt = 0; attempt < 2; ++attempt) {  // a failure is not remembered
    for (const std::string& part : process_arguments()) {
      BOOST_TEST_CONTEXT(part) {
        BOOST_TEST(throws_naming<Error>([] { cuda(); }, part));
      }
    }
  }
}

}  // namespace kvspan::test
