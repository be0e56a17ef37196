// Frames in huge pages that the administrator has set aside: the contract, and what only they do.
// What needs such pages is skipped where none are: `sysctl -w vm.nr_hugepages=64` lets it run.

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>

#include "backend/child.hpp"
#include "backend/contract.hpp"
#include "backend/host_backend.hpp"
#include "backend/host_hugetlb.hpp"
#include "backend/smaps.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kHugetlbPage;
constexpr std::uint32_t kNeeded = 40;

HugetlbReserve::Reading reserve() { return HugetlbReserve({}, "").read(); }

boost::test_tools::assertion_result is_configured(boost::unit_test::test_unit_id) {
  boost::test_tools::assertion_result result(reserve().available >= kPage * kNeeded);
  result.message() << "vm.nr_hugepages gives fewer than " << kNeeded << " free pages";
  return result;
}

HostOptions options(Bytes page_size, Bytes capacity) {
  HostOptions o;
  o.page_size = page_size;
  o.capacity = capacity;
  o.largest_class = SizeClass(3);
  o.hugetlb = Hugetlb::always;
  return o;
}

std::unique_ptr<Backend> make(Bytes page_size, Bytes capacity) {
  return make_host_backend(options(page_size, capacity));
}

const bool contracts = [] {
  add_contract(
      {.name = "host, hugetlb", .make = make, .page_size = kPage, .precondition = is_configured});
  return true;
}();

FrameId frame(std::uint32_t index) { return {SizeClass(0), index}; }

volatile char& byte(Address at) { return *reinterpret_cast<volatile char*>(at.value); }

}  // namespace

BOOST_AUTO_TEST_SUITE(host_hugetlb)

BOOST_AUTO_TEST_CASE(what_cannot_be_is_refused) {
  const Bytes all = reserve().total;
  const std::string pages = std::to_string(all.value / kPage.value + 1);
  BOOST_TEST(throws_naming<CapacityError>([&] { make(kPage, all + kPage); },
                                          "sysctl -w vm.nr_hugepages=" + pages));
  BOOST_TEST(throws_naming<InvalidArgument>([] { make(kMiB, kPage); }, "page_size"));
  HostOptions o = options(kPage, kPage);
  o.reserve = kMiB;
  BOOST_TEST(throws_naming<InvalidArgument>([&] { make_host_backend(o); }, "reserve"));
}

BOOST_AUTO_TEST_CASE(frames_come_out_of_the_reserve_and_go_back,
                     *boost::unit_test::precondition(is_configured)) {
  const Bytes before = reserve().available;
  {
    const auto b = make(kPage, kPage * 16);
    BOOST_TEST(reserve().available.value == before.value);
    b->create({frame(0), 4});
    b->create({FrameId(SizeClass(2), 3), 1});
    BOOST_TEST(reserve().available.value == (before - kPage * 8).value);
    BOOST_TEST(b->memory_info().available.value == (before - kPage * 8).value);
    const HugePages h = b->huge_pages();
    BOOST_TEST(h.hugetlb.value == (kPage * 8).value);
    BOOST_TEST(h.huge.value == (kPage * 8).value);
    BOOST_TEST(h.small.value == 0u);
    BOOST_TEST(h.refusal == "");
    const VirtualRange range = b->reserve(kPage * 4, Unmapped::zero);
    b->map(range.base, {frame(0), 4}, Access::read_write);
    BOOST_TEST(smaps(range.base, "KernelPageSize:") == kPage.value);
    BOOST_TEST(smaps(range.base, "Size:") == (kPage * 4).value);
    BOOST_TEST(reserve().available.value == (before - kPage * 8).value);  // mapping takes none
    b->unmap(range, 4);
    b->release({frame(1), 2});
    BOOST_TEST(reserve().available.value == (before - kPage * 6).value);
    BOOST_TEST(b->huge_pages().hugetlb.value == (kPage * 6).value);
    b->free(range);
  }
  BOOST_TEST(reserve().available.value == before.value);
}

BOOST_AUTO_TEST_CASE(running_out_is_an_answer, *boost::unit_test::precondition(is_configured)) {
  const auto free_pages = static_cast<std::uint32_t>(reserve().available.value / kPage.value);
  const auto others = make(kPage, kPage * free_pages), ours = make(kPage, kPage * 8);
  others->create({frame(0), free_pages - 3});
  try {
    ours->create({frame(0), 4});
    BOOST_ERROR("created what is not there");
  } catch (const OutOfMemory& e) {
    BOOST_TEST(e.requested().value == (kPage * 4).value);
    BOOST_TEST(std::string(e.what()).find("vm.nr_hugepages") != std::string::npos);
  }
  BOOST_TEST(reserve().available.value == (kPage * 3).value);  // nothing of it stays behind
  BOOST_TEST(ours->huge_pages().huge.value == 0u);
  // What could be created can be touched, every byte of it, with nothing left in the reserve.
  ours->create({frame(0), 3});
  BOOST_TEST(reserve().available.value == 0u);
  const VirtualRange range = ours->reserve(kPage * 3, Unmapped::fault);
  ours->map(range.base, {frame(0), 3}, Access::read_write);
  ours->fill(range.base, 7, range.size, {});
  const int end = run_in_child([&] {  // a copy of the process takes no pages either
    expect(throws_naming<OutOfMemory>([] { make(kPage, kPage)->create({frame(0), 1}); },
                                      "vm.nr_hugepages"),
           "an answer in the child as well");
  });
  BOOST_TEST(end == 0);
  BOOST_TEST(byte(range.base + kPage * 2) == 7);
  ours->unmap(range, 3);
  ours->free(range);
  BOOST_TEST(ours->failure_count() == 0u);
}

BOOST_AUTO_TEST_CASE(free_ones_are_chosen, *boost::unit_test::precondition(is_configured)) {
  HostOptions o = options(kPage, kPage * 8);
  o.hugetlb = Hugetlb::if_free;
  const auto b = make_host_backend(o);
  b->create({frame(0), 1});
  BOOST_TEST(b->huge_pages().hugetlb.value == kPage.value);
}

BOOST_AUTO_TEST_CASE(no_faults_after_a_map, *boost::unit_test::precondition(is_configured)) {
  if (kThreadSanitizer || kAddressSanitizer) return;  // whose shadow memory faults
  const auto b = make(kPage, kPage * 16);
  const VirtualRange range = b->reserve(kPage * 16, Unmapped::zero);
  b->create({frame(0), 16});
  b->map(range.base, {frame(0), 16}, Access::read_write);
  rusage before{}, after{};
  getrusage(RUSAGE_SELF, &before);
  for (Bytes at{}; at < range.size; at += kKiB * 4) byte(range.base + at) = 1;
  getrusage(RUSAGE_SELF, &after);
  BOOST_TEST(after.ru_minflt - before.ru_minflt < 8);
  b->unmap(range, 16);
  b->free(range);
}

BOOST_AUTO_TEST_CASE(a_child_of_a_fork_cannot_reach_them,
                     *boost::unit_test::precondition(is_configured)) {
  const Bytes before = reserve().available;
  {
    const auto b = make(kPage, kPage * 4);
    const VirtualRange range = b->reserve(kPage * 4, Unmapped::zero);
    b->create({frame(0), 2});
    b->map(range.base + kPage, {frame(0), 2}, Access::read_write);
    b->fill(range.base + kPage, 7, kPage * 2, {});
    BOOST_TEST(run_in_child([&] { byte(range.base + kPage) = 1; }) == kTrapped);
    BOOST_TEST(run_in_child([&] { expect(byte(range.base + kPage) == 9, "no"); }) == kTrapped);
    const int end = run_in_child([&] {
      expect(!b->usable(), "not usable");
      make(kPage, kPage)->create({frame(0), 1});
    });
    BOOST_TEST(end == 0);
    BOOST_TEST(byte(range.base + kPage) == 7);
    BOOST_TEST(byte(range.base + kPage * 2) == 7);
    BOOST_TEST(reserve().available.value == (before - kPage * 2).value);
    b->unmap({range.base + kPage, kPage * 2}, 2);
    b->free(range);
  }
  BOOST_TEST(reserve().available.value == before.value);
}

BOOST_AUTO_TEST_CASE(other_backends_import_what_they_can_map,
                     *boost::unit_test::precondition(is_configured)) {
  const auto b = make(kPage, kPage * 4);
  b->create({frame(3), 1});
  const ExportedFrame e = b->export_frame(frame(3));
  HostOptions o;
  o.page_size = kKiB * 64;
  o.capacity = kMiB * 4;
  o.largest_class = SizeClass(5);
  const auto of_small_pages = make_host_backend(o);
  BOOST_TEST(throws_naming<InvalidArgument>(
      [&] { of_small_pages->import_frame(FrameId(SizeClass(5), 0), e); }, "huge pages of 2 MiB"));
  o.page_size = kPage;
  const auto ordinary = make_host_backend(o);
  ordinary->import_frame(frame(1), e);
  close(e.fd);
  const VirtualRange here = b->reserve(kPage, Unmapped::fault);
  const VirtualRange there = ordinary->reserve(kPage * 2, Unmapped::fault);
  b->map(here.base, {frame(3), 1}, Access::read_write);
  ordinary->map(there.base + kPage, {frame(1), 1}, Access::read);
  b->fill(here.base, 5, kPage, {});
  BOOST_TEST(byte(there.base + kPage + (kPage - Bytes(1))) == 5);
  ordinary->unmap({there.base + kPage, kPage}, 1);
  ordinary->release({frame(1), 1});
  b->unmap(here, 1);
  b->free(here);
  ordinary->free(there);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
