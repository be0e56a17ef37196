// The tool of the fault-injection tests is itself tested: it passes the contract like any backend,
// fails what it is told to, and sees what a strict driver would.

#include <boost/test/unit_test.hpp>
#include <functional>
#include <string>

#include "backend/contract.hpp"
#include "backend/host_backend.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kKiB * 64;

std::unique_ptr<FaultyBackend> make(Bytes page_size = kPage, Bytes capacity = kPage * 16) {
  HostOptions o;
  o.page_size = page_size;
  o.capacity = capacity;
  o.largest_class = SizeClass(3);
  return std::make_unique<FaultyBackend>(make_host_backend(o));
}

const bool contract = add_contract(
    {"faulty over host", [](Bytes page, Bytes capacity) { return make(page, capacity); }, kPage});

FrameRun run(std::uint32_t first, std::uint32_t count, std::uint8_t size_class = 0) {
  return {FrameId(SizeClass(size_class), first), count};
}

// What a page or two go through.
void life(Backend& b) {
  const VirtualRange range = b.reserve(kPage * 4, Unmapped::zero);
  b.create(run(0, 2));
  b.map(range.base, run(0, 2), Access::read_write);
  b.fill(range.base, 1, kPage, {});
  b.copy(range.base + kPage, range.base, kPage, {});
  b.wait(b.record_fence({}));
  b.set_access({range.base, kPage * 2}, Access::read);
  b.unmap({range.base, kPage * 2}, 2);
  b.release(run(0, 2));
  b.free(range);
}

// The only violation that `misuse` commits on a backend with frames 0 and 1 at pages 0 and 1 and a
// frame of two pages at pages 4 and 5.
std::string violation_of(const std::function<void(Backend&, VirtualRange)>& misuse) {
  const auto b = make();
  const VirtualRange range = b->reserve(kPage * 8, Unmapped::zero);
  b->create(run(0, 2));
  b->create(run(2, 1, 1));
  b->map(range.base, run(0, 2), Access::read_write);
  b->map(range.base + kPage * 4, run(2, 1, 1), Access::read);
  BOOST_TEST(b->violations().empty());
  misuse(*b, range);
  const auto seen = b->violations();
  return seen.size() == 1 ? seen[0] : std::to_string(seen.size()) + " violations";
}

}  // namespace

BOOST_AUTO_TEST_SUITE(faulty_backend)

BOOST_AUTO_TEST_CASE(ordinary_use_violates_nothing) {
  const auto b = make();
  life(*b);
  BOOST_TEST(b->violations().empty());
  BOOST_TEST((b->live() == FaultyBackend::Live{0, 0, 0}));
}

BOOST_AUTO_TEST_CASE(every_call_can_be_failed_in_turn) {
  int n = 1;
  for (;; ++n) {
    const auto b = make();
    b->fail(static_cast<std::uint64_t>(n), Fault::driver);
    try {
      life(*b);
      break;
    } catch (const DriverError& e) {
      BOOST_TEST(e.code() == "EINJECTED");
    }
    BOOST_TEST(b->fired());
    BOOST_TEST(b->violations().empty());
  }
  BOOST_TEST(n == 10);  // nine calls can throw; release and free cannot
}

BOOST_AUTO_TEST_CASE(a_fault_has_a_name_a_type_and_a_number) {
  const auto b = make();
  const VirtualRange range = b->reserve(kPage * 4, Unmapped::zero);
  b->fail(2, Fault::out_of_memory, Call::create, 2);
  b->create(run(0, 1));
  BOOST_TEST(!b->fired());
  b->map(range.base, run(0, 1), Access::read_write);
  try {
    b->create(run(1, 2));
    BOOST_ERROR("did not fail");
  } catch (const OutOfMemory& e) {
    BOOST_TEST(e.requested().value == (kPage * 2).value);
  }
  BOOST_TEST((b->live() == FaultyBackend::Live{1, 1, 1}));
  BOOST_CHECK_THROW(b->create(run(1, 2)), OutOfMemory);
  b->create(run(1, 2));
  BOOST_TEST(b->failed_calls() == 2u);
  b->fail(1, Fault::capacity, Call::map, FaultyBackend::kEver);
  for (int i = 0; i < 3; ++i) {
    BOOST_CHECK_THROW(b->map(range.base + kPage, run(1, 1), Access::read), CapacityError);
  }
  b->fail_no_more();
  b->map(range.base + kPage, run(1, 1), Access::read);
}

BOOST_AUTO_TEST_CASE(what_cannot_throw_reports_and_leaks) {
  const auto b = make();
  b->create(run(0, 1));
  b->fail(1, Fault::driver, Call::release);
  b->release(run(0, 1));
  BOOST_TEST(b->fired());
  BOOST_TEST(b->failure_count() == 1u);
  BOOST_TEST(b->live().frames == 1u);
}

BOOST_AUTO_TEST_CASE(fences_wait_for_the_test) {
  const auto b = make();
  b->set_manual_fences(true);
  const Fence first = b->record_fence({}), second = b->record_fence({});
  BOOST_TEST(!b->is_passed(first));
  b->pass(first);
  BOOST_TEST(b->is_passed(first));
  BOOST_TEST(!b->is_passed(second));
  b->wait(first);
  BOOST_TEST(b->waited_for().empty());
  BOOST_TEST(b->unpassed().size() == 1u);
  b->wait(second);
  BOOST_TEST(b->is_passed(second));
  BOOST_REQUIRE(b->waited_for().size() == 1u);
  BOOST_TEST(b->waited_for()[0].id == second.id);
  BOOST_TEST(b->is_passed(Fence{}));
}

BOOST_AUTO_TEST_CASE(what_a_strict_driver_refuses_is_seen) {
  const auto names = [](const std::string& part, auto misuse) {
    const std::string seen = violation_of(misuse);
    BOOST_TEST(seen.find(part) != std::string::npos, part << ", seen: " << seen);
  };
  using R = VirtualRange;
  names("map: pages are mapped already",
        [](Backend& b, R r) { b.map(r.base + kPage, run(0, 1), Access::read); });
  names("map: pages are mapped already", [](Backend& b, R r) {  // reaches into a frame's middle
    b.map(r.base + kPage * 5, run(0, 1), Access::read);
  });
  names("unmap: ends inside a frame",
        [](Backend& b, R r) { b.unmap({r.base + kPage * 4, kPage}, 1); });
  names("unmap: begins inside a frame",
        [](Backend& b, R r) { b.unmap({r.base + kPage * 5, kPage}, 1); });
  names("unmap: pages of the range are unbacked",
        [](Backend& b, R r) { b.unmap({r.base, kPage * 3}, 2); });
  names("unmap: told of 1 frames, there are 2",
        [](Backend& b, R r) { b.unmap({r.base, kPage * 2}, 1); });
  names("release: frame 0/1 is mapped", [](Backend& b, R) { b.release(run(1, 1)); });
  names("release: frame 0/7 does not exist", [](Backend& b, R) { b.release(run(7, 1)); });
  names("map: frame 0/7 does not exist",
        [](Backend& b, R r) { b.map(r.base + kPage * 2, run(7, 1), Access::read); });
  names("create: frame 0/1 exists", [](Backend& b, R) { b.create(run(1, 2)); });
  names("free: pages are still mapped", [](Backend& b, R r) { b.free(r); });
  names("free: no such reservation", [](Backend& b, R r) { b.free({r.base + kPage * 2, kPage}); });
  names("set_access: pages of the range are unbacked",
        [](Backend& b, R r) { b.set_access({r.base + kPage * 2, kPage}, Access::none); });
  names("copy: reads unbacked bytes",
        [](Backend& b, R r) { b.copy(r.base, r.base + kPage * 2, Bytes(8), {}); });
  names("copy: the ranges overlap", [](Backend& b, R r) { b.copy(r.base, r.base, Bytes(8), {}); });
  names("frame 0/3 does not exist", [](Backend& b, R) { b.release(run(3, 1)); });
  names("wait: no such fence", [](Backend& b, R) { b.wait(Fence{77}); });
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
