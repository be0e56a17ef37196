// The host backend: the contract for several page sizes, and what only a host has.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "backend/child.hpp"
#include "backend/contract.hpp"
#include "backend/host_backend.hpp"
#include "backend/smaps.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kMiB * 2;

std::unique_ptr<Backend> make(Bytes page_size, Bytes capacity, bool huge_pages = true) {
  HostOptions o;
  o.page_size = page_size;
  o.capacity = capacity;
  o.largest_class = SizeClass(3);
  o.huge_pages = huge_pages;
  return make_host_backend(o);
}

const bool contracts = [] {
  const auto host = [](Bytes p, Bytes c) { return make(p, c); };
  add_contract({"host, 64 KiB", host, kKiB * 64});
  add_contract({"host, 2 MiB", host, kMiB * 2});
  add_contract({"host, 4 MiB", host, kMiB * 4});
  add_contract(
      {"host, 2 MiB of small pages", [](Bytes p, Bytes c) { return make(p, c, false); }, kMiB * 2});
  return true;
}();

FrameId frame(std::uint32_t index) { return {SizeClass(0), index}; }

volatile char& byte(Address at) { return *reinterpret_cast<volatile char*>(at.value); }

// The memory that the backends of this process hold, as the kernel counts it.
std::uint64_t memfd_bytes() {
  std::uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone).string();
    struct stat status{};
    if (target.starts_with("/memfd:kvspan") && stat(entry.path().c_str(), &status) == 0) {
      bytes += static_cast<std::uint64_t>(status.st_blocks) * 512;
    }
  }
  return bytes;
}

long minor_faults() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(host_backend)

BOOST_AUTO_TEST_CASE(options_are_checked) {
  const auto refuses = [](Bytes page_size, Bytes capacity, const std::string& part) {
    return throws_naming<InvalidArgument>([&] { make(page_size, capacity); }, part);
  };
  BOOST_TEST(refuses(kMiB * 3, kMiB * 12, "3 MiB"));
  BOOST_TEST(refuses(kKiB * 32, kMiB * 12, "64 KiB"));
  BOOST_TEST(refuses(kMiB * 128, kMiB * 128, "64 MiB"));
  BOOST_TEST(refuses(kPage, Bytes(0), "capacity"));
  BOOST_TEST(refuses(kPage, kMiB * 3, "3 MiB"));
  const Bytes machine = make(kPage, kPage)->memory_info().total;
  BOOST_TEST(
      refuses(kPage, Bytes(round_up(machine.value, kPage.value)) + kPage, to_string(machine)));
}

BOOST_AUTO_TEST_CASE(memory_is_there_at_create_and_gone_at_release) {
  const auto b = make(kPage, kMiB * 64);
  BOOST_TEST(memfd_bytes() == 0u);
  b->create({frame(0), 4});
  BOOST_TEST(memfd_bytes() == (kPage * 4).value);
  b->create({FrameId(SizeClass(2), 3), 1});
  BOOST_TEST(memfd_bytes() == (kPage * 8).value);
  b->release({frame(1), 2});
  BOOST_TEST(memfd_bytes() == (kPage * 6).value);
  b->release({frame(0), 1});
  b->release({frame(3), 1});
  b->release({FrameId(SizeClass(2), 3), 1});
  BOOST_TEST(memfd_bytes() == 0u);
}

BOOST_AUTO_TEST_CASE(the_machines_figures_follow) {
  const auto shmem = [] {
    std::ifstream file("/proc/meminfo");
    for (std::string line; std::getline(file, line);) {
      if (line.starts_with("Shmem:")) return std::stoll(line.substr(6)) * 1024;
    }
    return 0ll;
  };
  const auto b = make(kPage, kMiB * 64);
  const long long before = shmem();
  b->create({frame(0), 32});
  BOOST_TEST(shmem() - before > 48ll << 20);  // others share the machine
  b->release({frame(0), 32});
  BOOST_TEST(shmem() - before < 16ll << 20);
}

BOOST_AUTO_TEST_CASE(huge_pages_are_used_or_the_reason_is_told) {
  const auto b = make(kPage, kMiB * 64);
  b->create({frame(0), 8});
  const HugePages h = b->huge_pages();
  if (h.small > Bytes(0)) {
    BOOST_TEST(!h.refusal.empty());
    BOOST_TEST_MESSAGE("skipped: " << h.refusal);
    return;
  }
  BOOST_TEST(h.huge.value == (kPage * 8).value);
  BOOST_TEST(h.refusal == "");
  const VirtualRange range = b->reserve(kPage * 8, Unmapped::zero);
  b->map(range.base, {frame(0), 8}, Access::read_write);
  BOOST_TEST(smaps(range.base, "ShmemPmdMapped:") == range.size.value);
  b->unmap(range, 8);
  b->release({frame(2), 1});
  BOOST_TEST(b->huge_pages().huge.value == (kPage * 7).value);
  b->free(range);
}

BOOST_AUTO_TEST_CASE(huge_pages_can_be_turned_off) {
  const auto b = make(kPage, kMiB * 64, false);
  b->create({frame(0), 3});
  BOOST_TEST(b->huge_pages().huge.value == 0u);
  BOOST_TEST(b->huge_pages().small.value == (kPage * 3).value);
  BOOST_TEST(b->huge_pages().refusal.find("turned off") != std::string::npos);
  b->release({frame(0), 3});
  BOOST_TEST(b->huge_pages().small.value == 0u);
  BOOST_TEST(b->huge_pages().refusal == "");
}

BOOST_AUTO_TEST_CASE(refused_huge_pages_are_made_up_by_small_ones) {
  const int end = run_in_child([] {
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    const auto b = make(kPage, kMiB * 16);
    b->create({frame(0), 2});
    expect(b->huge_pages().small == kPage * 2, "two small frames");
    expect(b->huge_pages().refusal.find("EINVAL") != std::string::npos, "the reason");
    expect(memfd_bytes() == (kPage * 2).value, "all of the memory");
    b->release({frame(0), 2});
    expect(b->huge_pages().small == Bytes(0) && memfd_bytes() == 0, "nothing left");
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_CASE(a_long_run_of_huge_pages_faults_once_a_page) {
  if (kThreadSanitizer || kAddressSanitizer) return;  // whose shadow memory faults
  const auto b = make(kPage, kMiB * 64, true);
  const VirtualRange range = b->reserve(kMiB * 64, Unmapped::zero);
  b->create({frame(0), 32});
  if (b->huge_pages().small != Bytes(0)) return;  // the machine has none to give
  b->map(range.base, {frame(0), 32}, Access::read_write);
  const long before = minor_faults();
  for (Bytes at{}; at < range.size; at += kKiB * 4) byte(range.base + at) = 1;
  BOOST_TEST(minor_faults() - before <= 32 + 8);
  b->unmap(range, 32);
  b->free(range);
}

BOOST_AUTO_TEST_CASE(no_faults_after_a_map) {
  if (kThreadSanitizer) {
    BOOST_TEST_MESSAGE("skipped: ThreadSanitizer's shadow memory faults with every page");
    return;
  }
  for (const bool huge : {true, false}) {
    const auto b = make(kPage, kMiB * 32, huge);
    const VirtualRange range = b->reserve(kMiB * 32, Unmapped::zero);
    b->create({frame(0), 16});
    b->map(range.base, {frame(0), 16}, Access::read_write);
    const long before = minor_faults();
    for (Bytes at{}; at < range.size; at += kKiB * 4) byte(range.base + at) = 1;
    // AddressSanitizer's shadow memory has a few faults of its own; without populate it is 8192.
    BOOST_TEST(minor_faults() - before < (kAddressSanitizer ? 2048 : 8));
    b->unmap(range, 16);
    b->free(range);
  }
}

BOOST_AUTO_TEST_CASE(stray_accesses_trap) {
  const auto b = make(kPage, kMiB * 8);
  const VirtualRange zeros = b->reserve(kPage * 2, Unmapped::zero);
  const VirtualRange faults = b->reserve(kPage * 2, Unmapped::fault);
  // Unbacked again, too: the policy is restored, not only there at first.
  b->create({frame(0), 1});
  for (const VirtualRange range : {zeros, faults}) {
    b->map(range.base, {frame(0), 1}, Access::read_write);
    byte(range.base) = 7;
    b->unmap({range.base, kPage}, 1);
  }
  BOOST_TEST(byte(zeros.base) == 0);
  // fork would seal the ranges itself, so what a page allows is asked of the kernel.
  const auto protection = [](Address at) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      std::uintptr_t first = 0, end = 0;
      char dash = 0;
      std::string mode;
      std::istringstream(line) >> std::hex >> first >> dash >> end >> mode;
      if (first <= at.value && at.value < end) return mode;
    }
    return std::string("none");
  };
  BOOST_TEST(protection(zeros.base) == "r--p");
  BOOST_TEST(protection(zeros.base + kPage) == "r--p");
  BOOST_TEST(protection(faults.base) == "---p");
  BOOST_TEST(protection(faults.base + kPage) == "---p");
  b->map(zeros.base, {frame(0), 1}, Access::read);
  BOOST_TEST(protection(zeros.base) == "r--s");
  b->unmap({zeros.base, kPage}, 1);

  // And really: in a child with a backend of its own.
  enum Stray { write_zeros, read_faults, write_faults, write_read_only };
  for (const Stray stray : {write_zeros, read_faults, write_faults, write_read_only}) {
    const int end = run_in_child([&] {
      const auto own = make(kPage, kPage);
      const VirtualRange z = own->reserve(kPage, Unmapped::zero);
      const VirtualRange f = own->reserve(kPage, Unmapped::fault);
      expect(byte(z.base) == 0, "zeros");
      own->create({frame(0), 1});
      if (stray == write_zeros) byte(z.base) = 1;
      if (stray == read_faults) expect(byte(f.base) == 99, "unreachable");
      if (stray == write_faults) byte(f.base) = 1;
      own->map(z.base, {frame(0), 1}, Access::read);
      if (stray == write_read_only) byte(z.base) = 1;
    });
    BOOST_TEST(end == kTrapped);
  }
  b->free(zeros);
  b->free(faults);
}

BOOST_AUTO_TEST_CASE(a_destroyed_backend_leaves_nothing) {
  Address base;
  {
    const auto b = make(kPage, kMiB * 8);
    const VirtualRange range = b->reserve(kMiB * 8, Unmapped::zero);
    base = range.base;
    b->create({frame(0), 4});
    b->map(range.base, {frame(0), 4}, Access::read_write);
  }
  BOOST_TEST(memfd_bytes() == 0u);
  BOOST_TEST(msync(reinterpret_cast<void*>(base.value), kPage.value, MS_ASYNC) == -1);
}

// The second of three pieces of the file cannot be mapped: the first one goes as well.
BOOST_AUTO_TEST_CASE(a_run_that_cannot_be_mapped_in_part_is_not_mapped) {
  const auto b = make(kPage, kPage * 8);
  const VirtualRange range = b->reserve(kPage * 3, Unmapped::zero);
  b->create({frame(0), 1});
  b->create({frame(2), 1});
  b->create({frame(5), 1});
  ExportedFrame e = b->export_frame(frame(5));
  const int writable = e.fd;
  e.fd = open(("/proc/self/fd/" + std::to_string(writable)).c_str(), O_RDONLY | O_CLOEXEC);
  close(writable);
  BOOST_REQUIRE(e.fd >= 0);
  b->import_frame(frame(1), e);
  close(e.fd);
  b->map(range.base, {frame(0), 1}, Access::read_write);
  b->fill(range.base, 7, kPage, {});
  b->unmap({range.base, kPage}, 1);
  BOOST_CHECK_THROW(b->map(range.base, {frame(0), 3}, Access::read_write), DriverError);
  BOOST_TEST(byte(range.base) == 0);
  BOOST_TEST(b->mappings() == 0u);
  b->map(range.base, {frame(0), 3}, Access::read);
  BOOST_TEST(byte(range.base) == 7);
  b->unmap(range, 3);
  b->release({frame(0), 3});
  b->release({frame(5), 1});
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
  BOOST_TEST(memfd_bytes() == 0u);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
