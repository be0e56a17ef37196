// fork(2): the parent's memory is out of a child's reach, whatever other threads were doing.

#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <thread>
#include <vector>

#include "backend/child.hpp"
#include "backend/host_backend.hpp"
#include "backend/host_mappings.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kMiB * 2;
constexpr FrameRun kRun{FrameId(SizeClass(0), 0), 2};

std::unique_ptr<Backend> make() {
  HostOptions o;
  o.page_size = kPage;
  o.capacity = kPage * 8;
  return make_host_backend(o);
}

volatile char& byte(Address at) { return *reinterpret_cast<volatile char*>(at.value); }

struct Mapped {
  std::unique_ptr<Backend> backend = make();
  VirtualRange range = backend->reserve(kPage * 2, Unmapped::zero);

  Mapped() {
    backend->create(kRun);
    backend->map(range.base, kRun, Access::read_write);
    backend->fill(range.base, 7, range.size, {});
  }
};

}  // namespace

BOOST_AUTO_TEST_SUITE(host_fork)

BOOST_AUTO_TEST_CASE(a_child_cannot_reach_the_parents_bytes) {
  const Mapped m;
  BOOST_TEST(run_in_child([&] { byte(m.range.base) = 1; }) == kTrapped);
  BOOST_TEST(run_in_child([&] { expect(byte(m.range.base) == 99, "unreachable"); }) == kTrapped);
  BOOST_TEST(byte(m.range.base) == 7);
  BOOST_TEST(m.backend->usable());
}

BOOST_AUTO_TEST_CASE(a_childs_calls_raise_and_its_destructor_spares_the_parent) {
  Mapped m;
  const int end = run_in_child([&] {
    Backend& b = *m.backend;
    expect(!b.usable(), "not usable");
    const auto raises = [](auto call) { return throws_naming<ReleasedError>(call, "forked"); };
    expect(raises([&] { b.reserve(kPage, Unmapped::zero); }), "reserve raises");
    expect(raises([&] { b.create({FrameId(SizeClass(0), 4), 1}); }), "create raises");
    expect(raises([&] { b.map(m.range.base, kRun, Access::read); }), "map raises");
    expect(raises([&] { b.unmap(m.range, 2); }), "unmap raises");
    expect(raises([&] { b.set_access(m.range, Access::read_write); }), "set_access raises");
    expect(raises([&] { b.fill(m.range.base, 1, kPage, {}); }), "fill raises");
    expect(raises([&] { b.memory_info(); }), "memory_info raises");
    b.release(kRun);
    b.free(m.range);
    // The first free descriptor is what was the memory's file: it must not be closed a second time.
    const int reused = open("/dev/null", O_RDONLY | O_CLOEXEC);
    m.backend.reset();
    expect(fcntl(reused, F_GETFD) >= 0, "the destructor leaves the child's descriptors alone");
    expect(!has_hole(m.range), "and the range stays sealed: nobody else may get it");
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      const auto target = std::filesystem::read_symlink(entry.path(), gone).string();
      expect(!target.starts_with("/memfd:kvspan"), "the memory's file is closed");
    }
    const Mapped own;  // a new one works
    expect(byte(own.range.base) == 7 && own.backend->usable(), "a backend of the child's own");
  });
  BOOST_TEST(end == 0);
  BOOST_TEST(byte(m.range.base) == 7);
  BOOST_TEST(byte(m.range.base + kPage) == 7);
}

BOOST_AUTO_TEST_CASE(grandchildren_too) {
  const Mapped m;
  const int end = run_in_child([&] {
    const Mapped own;
    expect(run_in_child([&] { byte(own.range.base) = 1; }) == kTrapped, "the child's memory");
    expect(run_in_child([&] { byte(m.range.base) = 1; }) == kTrapped, "the parent's memory");
    const int grandchild = run_in_child(
        [&] { expect(!m.backend->usable() && !own.backend->usable(), "neither is usable"); });
    expect(grandchild == 0, "usable in the grandchild");
    expect(byte(own.range.base) == 7, "the child's bytes");
  });
  BOOST_TEST(end == 0);
  BOOST_TEST(byte(m.range.base) == 7);
}

BOOST_AUTO_TEST_CASE(what_was_freed_is_not_sealed) {
  // A range given back may be anybody's by the time of the fork.
  const auto b = make();
  const VirtualRange range = b->reserve(kPage, Unmapped::zero);
  b->free(range);
  void* const anybody = mmap(pointer(range.base), kPage.value, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  BOOST_REQUIRE(anybody == pointer(range.base));
  byte(range.base) = 5;
  BOOST_TEST(run_in_child([&] { expect(byte(range.base) == 5, "somebody's bytes"); }) == 0);
  munmap(anybody, kPage.value);
}

BOOST_AUTO_TEST_CASE(forks_while_other_threads_are_inside_calls) {
  // A child allocates, and AddressSanitizer's allocator leaves a lock that another thread held
  // locked there (GCC 12; https://github.com/llvm/llvm-project/pull/75290). glibc's does not.
  if (kThreadSanitizer || kAddressSanitizer) {
    BOOST_TEST_MESSAGE("skipped: sanitizers do not follow forks of threaded processes");
    return;
  }
  auto b = make();
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const FrameRun run{FrameId(SizeClass(0), t), 1};
      while (!stop.load(std::memory_order_relaxed)) {
        const VirtualRange range = b->reserve(kPage, Unmapped::zero);
        b->create(run);
        b->map(range.base, run, Access::read_write);
        byte(range.base) = 1;
        b->unmap(range, 1);
        b->release(run);
        b->free(range);
      }
    });
  }
  int ended_well = 0;
  for (int i = 0; i < 60; ++i) {
    ended_well += run_in_child([&] {
                    expect(!b->usable(), "not usable");
                    b.reset();  // meets locks that the threads held and nobody will release
                    const Mapped own;
                    expect(byte(own.range.base) == 7, "a backend of the child's own");
                  }) == 0;
  }
  stop.store(true, std::memory_order_relaxed);
  for (std::thread& thread : threads) thread.join();
  BOOST_TEST(ended_well == 60);
  BOOST_TEST(b->failure_count() == 0u);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
