// The host backend at the machine's limits, each of them really reached in a child.

#include <sys/mman.h>
#include <sys/resource.h>

#include <boost/test/unit_test.hpp>
#include <vector>

#include "backend/child.hpp"
#include "backend/host_backend.hpp"
#include "backend/host_files.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kKiB * 64;

std::unique_ptr<Backend> make(Bytes capacity) {
  HostOptions o;
  o.page_size = kPage;
  o.capacity = capacity;
  return make_host_backend(o);
}

FrameRun one(std::uint32_t index) { return {FrameId(SizeClass(0), index), 1}; }

char& byte(Address at) { return *reinterpret_cast<char*>(at.value); }

}  // namespace

BOOST_AUTO_TEST_SUITE(host_limits)

BOOST_AUTO_TEST_CASE(too_many_mappings) {
  if (kAddressSanitizer || kThreadSanitizer) {
    BOOST_TEST_MESSAGE("skipped: the sanitizer itself maps memory and ends when it cannot");
    return;
  }
  const auto limit = read_number("/proc/sys/vm/max_map_count");
  if (!limit || *limit > 300'000) {
    BOOST_TEST_MESSAGE("skipped: vm.max_map_count is too large to be reached quickly");
    return;
  }
  const int end = run_in_child([&] {
    const auto b = make(kPage * 4);
    const auto pages = static_cast<std::uint32_t>(*limit + 2);
    const VirtualRange range = b->reserve(kPage * pages, Unmapped::zero);
    const auto at = [&](std::uint32_t page) { return range.base + kPage * page; };
    b->create({FrameId(SizeClass(0), 0), 4});
    // Twice: what was given up to get out of it the first time is there again.
    for (int round = 0; round < 2; ++round) {
      // One frame under every second page: neighbours that cannot merge.
      std::uint32_t n = 0;
      const bool named = throws_naming<CapacityError>(
          [&] {
            for (; 2 * n < pages; ++n) b->map(at(2 * n), one(0), Access::read_write);
          },
          "vm.max_map_count allows " + std::to_string(*limit));
      expect(named, "a CapacityError that names the setting");
      expect(n > *limit / 2 - 1000, "not long before the limit");
      // Everything is as it was: the page that failed reads zeros, the others share their bytes.
      byte(at(0)) = static_cast<char>(41 + round);
      expect(byte(at(2 * n)) == 0, "the page that failed is unbacked");
      expect(byte(at(2 * (n - 1))) == 41 + round, "the page before it is mapped");
      expect(byte(at(1)) == 0, "the gaps are unbacked");
      bool again = throws_naming<CapacityError>([&] { b->map(at(2 * n), one(1), Access::read); },
                                                "sysctl -w vm.max_map_count");
      expect(again, "the same answer when asked again");
      // Somebody else takes what mappings are left, if any.
      std::vector<void*> others;
      for (int protection = PROT_NONE;; protection ^= PROT_READ) {
        void* const other = mmap(nullptr, 4096, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (other == MAP_FAILED) break;
        others.push_back(other);
      }
      // And the way out is open: every page can be unmapped, in whatever order.
      for (std::uint32_t i = 0; i < n; i += 2) b->unmap({at(2 * i), kPage}, 1);
      for (std::uint32_t i = 1; i < n; i += 2) b->unmap({at(2 * i), kPage}, 1);
      expect(byte(at(0)) == 0, "unbacked again");
      for (void* const other : others) munmap(other, 4096);
      b->map(at(0), one(0), Access::read_write);
      expect(byte(at(0)) == 41 + round, "and mapped again");
      b->unmap({at(0), kPage}, 1);
      expect(b->failure_count() == 0, "no failures");
    }
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_CASE(file_size) {
  const int end = run_in_child([] {
    const rlimit limit{kMiB.value, kMiB.value};
    setrlimit(RLIMIT_FSIZE, &limit);
    const bool named = throws_naming<CapacityError>([] { make(kMiB * 2); }, "RLIMIT_FSIZE");
    expect(named, "an error that names RLIMIT_FSIZE, and no SIGXFSZ");
    make(kMiB)->create({FrameId(SizeClass(0), 0), 16});
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_CASE(address_space) {
  if (kAddressSanitizer || kThreadSanitizer) {
    BOOST_TEST_MESSAGE("skipped: the sanitizer itself needs terabytes of address space");
    return;
  }
  const int end = run_in_child([] {
    const auto b = make(kMiB);
    const rlimit limit{kGiB.value, kGiB.value};
    setrlimit(RLIMIT_AS, &limit);
    bool named = throws_naming<CapacityError>([&] { b->reserve(kGiB * 4, Unmapped::zero); },
                                              "RLIMIT_AS limits this process to 1 GiB");
    expect(named, "an error that names RLIMIT_AS");
    b->free(b->reserve(kMiB * 64, Unmapped::zero));
    expect(b->failure_count() == 0, "no failures");
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_CASE(more_than_all_address_space) {
  const auto b = make(kMiB);
  BOOST_TEST(throws_naming<CapacityError>(
      [&] { b->reserve(Bytes(std::uint64_t{1} << 48), Unmapped::fault); }, "address space"));
  BOOST_TEST(throws_naming<CapacityError>([&] { b->reserve(Bytes(0) - kPage, Unmapped::fault); },
                                          "address space"));
}

BOOST_AUTO_TEST_CASE(descriptors) {
  const int end = run_in_child([] {
    const rlimit limit{3, 3};
    setrlimit(RLIMIT_NOFILE, &limit);
    // Nothing can be opened, so what is looked at first (/proc/meminfo) is what fails.
    bool failed = false;
    try {
      make(kMiB);
    } catch (const Error&) {
      failed = true;
    }
    expect(failed, "a typed error");
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
