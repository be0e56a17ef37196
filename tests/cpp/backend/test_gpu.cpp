// The CUDA backend on whatever driver the machine has: the contract, and what streams ask for. Ends
// with status 77, which ctest takes for skipped, where there is no GPU; on the emulator it says so.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "backend/contract.hpp"
#include "backend/cuda_rig.hpp"

namespace kvspan::test {

namespace {

// Says what the tests run on, once, before any of them.
struct Device {
  Device() {
    if (library() == nullptr) skip("libcuda.so.1 was not found: no NVIDIA driver");
    int count = 0, device = 0;
    const int status = function<int(unsigned)>("cuInit")(0);
    if (status != 0) skip("cuInit failed with error " + std::to_string(status));
    function<int(int*)>("cuDeviceGetCount")(&count);
    if (count == 0) skip("the driver shows no device");
    char name[128] = "";
    function<int(int*, int)>("cuDeviceGet")(&device, 0);
    function<int(char*, int, int)>("cuDeviceGetName")(name, sizeof(name), device);
    std::printf("on %s%s\n", name, is_emulated() ? ": NOT A GPU RESULT" : "");
  }

  [[noreturn]] static void skip(const std::string& why) {
    std::printf("skipped: %s\n", why.c_str());
    std::fflush(nullptr);
    std::_Exit(77);
  }
};
BOOST_TEST_GLOBAL_FIXTURE(Device);

const bool contract =
    add_contract({"cuda, 2 MiB", [](Bytes p, Bytes c) { return cuda(p, c); }, kMiB * 2, peek}) &&
    add_contract({"cuda, 4 MiB", [](Bytes p, Bytes c) { return cuda(p, c); }, kMiB * 4, peek});

// A stream of the caller's, whose work waits until `open`: the longest kernel there is. It opens by
// itself in the end, so that whoever waits for it wrongly fails instead of hanging.
class Gate {
 public:
  Gate() {
    const auto wait = [](void* self) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (!static_cast<Gate*>(self)->is_open_ && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
    };
    BOOST_REQUIRE(function<int(void**, unsigned)>("cuStreamCreate")(&stream_, 1) == 0);
    using HostFunction = void (*)(void*);
    BOOST_REQUIRE(
        function<int(void*, HostFunction, void*)>("cuLaunchHostFunc")(stream_, wait, this) == 0);
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  ~Gate() {
    open();
    function<int(void*)>("cuStreamSynchronize")(stream_);
    function<int(void*)>("cuStreamDestroy_v2")(stream_);
  }
  void open() { is_open_ = true; }
  Stream stream() const { return {reinterpret_cast<std::uintptr_t>(stream_)}; }

 private:
  void* stream_ = nullptr;
  std::atomic<bool> is_open_{false};
};

struct Mapped {
  const std::unique_ptr<Backend> b = cuda();
  const UserContext context;
  const VirtualRange range = b->reserve(kMiB * 2, Unmapped::fault);
  Mapped() {
    b->create(frames(0, 1));
    b->map(range.base, frames(0, 1), Access::read_write);
  }
  ~Mapped() {
    b->unmap(range, 1);
    b->release(frames(0, 1));
    b->free(range);
    BOOST_TEST(b->failure_count() == 0u);
  }
};

}  // namespace

BOOST_AUTO_TEST_SUITE(streams)

BOOST_FIXTURE_TEST_CASE(fences_are_of_their_stream, Mapped) {
  Gate gate;
  b->fill(range.base, 1, range.size, gate.stream());
  const Fence first = b->record_fence(gate.stream());
  b->order_after(b->own_stream(), first);
  b->fill(range.base, 2, range.size, b->own_stream());
  const Fence second = b->record_fence(b->own_stream());
  BOOST_TEST(!b->is_passed(first));
  BOOST_TEST(!b->is_passed(second));
  gate.open();
  b->wait(second);
  BOOST_TEST(b->is_passed(first));
  BOOST_TEST(peek(*b, range.base) == 2);
}

// Neither creating, mapping, unmapping nor releasing waits for the device.
BOOST_FIXTURE_TEST_CASE(nothing_waits_for_work_of_others, Mapped) {
  Gate gate;
  b->fill(range.base, 1, range.size, gate.stream());
  const Fence fence = b->record_fence(gate.stream());
  const VirtualRange other = b->reserve(kMiB * 4, Unmapped::fault);
  b->create(frames(1, 2));
  b->map(other.base, frames(1, 2), Access::read_write);
  b->fill(other.base, 7, other.size, b->own_stream());
  b->wait(b->record_fence(b->own_stream()));
  b->unmap(other, 2);
  b->release(frames(1, 2));
  b->free(other);
  BOOST_TEST(!b->is_passed(fence));
  gate.open();
  b->wait(fence);
}

BOOST_FIXTURE_TEST_CASE(a_mirror_is_not_overwritten_before_its_copy, Mapped) {
  constexpr std::uint8_t kTimes = 4;
  Gate gate;
  const auto mirror = b->make_mirror(Bytes(4));
  auto* const host = static_cast<std::uint8_t*>(mirror->host());
  for (std::uint8_t i = 0; i < kTimes; ++i) {
    host[0] = static_cast<std::uint8_t>(i + 1);
    mirror->publish(gate.stream());
    b->copy(range.base + Bytes(i), mirror->device(), Bytes(1), gate.stream());
    host[0] = 77;  // not published
  }
  gate.open();
  b->wait(b->record_fence(gate.stream()));
  for (std::uint8_t i = 0; i < kTimes; ++i) BOOST_TEST(peek(*b, range.base + Bytes(i)) == i + 1);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
