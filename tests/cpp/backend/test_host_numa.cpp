// Which NUMA node frames come from. On a machine of one node this shows that the kernel was told,
// that the pages are there and that nothing else changed; on one of several, that they are where
// they should be.

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <boost/test/unit_test.hpp>
#include <vector>

#include "backend/child.hpp"
#include "backend/host_backend.hpp"
#include "backend/host_hugetlb.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

constexpr Bytes kPage = kMiB * 2;
constexpr std::uint32_t kPages = 4;
constexpr unsigned long kMaxNode = 1025;
using NodeMask = std::array<unsigned long, 16>;

struct Policy {
  int mode = -1;
  NodeMask nodes{};
  bool operator==(const Policy&) const = default;
};

Policy policy_of(void* address, unsigned long flags) {
  Policy p;
  if (syscall(SYS_get_mempolicy, &p.mode, p.nodes.data(), kMaxNode, address, flags) != 0) {
    p.mode = -1;
  }
  return p;
}

// The nodes that this process may use; none where the kernel does not say.
std::vector<NumaNode> nodes() {
  NodeMask mask{};
  std::vector<NumaNode> found;
  if (syscall(SYS_get_mempolicy, nullptr, mask.data(), kMaxNode, nullptr, MPOL_F_MEMS_ALLOWED)) {
    return found;
  }
  for (std::uint32_t node = 0; node < 1024; ++node) {
    if (mask[node / 64] >> (node % 64) & 1) found.emplace_back(node);
  }
  return found;
}

boost::test_tools::assertion_result numa_is_there(boost::unit_test::test_unit_id) {
  boost::test_tools::assertion_result result(!nodes().empty());
  result.message() << "this kernel has no NUMA, or does not let the process ask";
  return result;
}

HostOptions options(NumaNode node, Hugetlb hugetlb = Hugetlb::never) {
  HostOptions o;
  o.page_size = kPage;
  o.capacity = kPage * 8;
  o.numa_node = node;
  o.hugetlb = hugetlb;
  return o;
}

// Where every small page of a range is; what the kernel answers instead of a node is negative.
std::vector<int> where(VirtualRange range) {
  std::vector<void*> pages;
  for (Bytes at{}; at < range.size; at += kKiB * 4) {
    pages.push_back(reinterpret_cast<void*>((range.base + at).value));
  }
  std::vector<int> status(pages.size(), -1);
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0) != 0) {
    return {};
  }
  return status;
}

// Frames of a backend, mapped.
struct Mapped {
  explicit Mapped(const HostOptions& o) : backend(make_host_backend(o)) {
    backend->create({FrameId(SizeClass(0), 1), kPages});
    range = backend->reserve(kPage * kPages, Unmapped::zero);
    backend->map(range.base, {FrameId(SizeClass(0), 1), kPages}, Access::read_write);
  }
  void* address() const { return reinterpret_cast<void*>(range.base.value); }

  std::unique_ptr<Backend> backend;
  VirtualRange range;
};

bool all_at(const std::vector<int>& pages, NumaNode node) {
  if (pages.empty()) return false;
  for (const int at : pages) {
    if (at != static_cast<int>(node.value)) return false;
  }
  return true;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(host_numa)

BOOST_AUTO_TEST_CASE(nodes_that_are_not_there_are_refused,
                     *boost::unit_test::precondition(numa_is_there)) {
  const std::uint32_t beyond = nodes().back().value + 1;
  const std::string first = "there are: " + std::to_string(nodes().front().value);
  for (const std::uint32_t node : {beyond, 1023u, 1024u, 1u << 31}) {
    for (const Hugetlb hugetlb : {Hugetlb::never, Hugetlb::always, Hugetlb::if_free}) {
      BOOST_TEST(throws_naming<InvalidArgument>(
          [&] { make_host_backend(options(NumaNode(node), hugetlb)); }, first));
    }
  }
}

BOOST_AUTO_TEST_CASE(frames_are_on_their_node, *boost::unit_test::precondition(numa_is_there)) {
  const Policy of_thread = policy_of(nullptr, 0);
  for (const NumaNode node : nodes()) {
    for (const bool huge : {true, false}) {
      HostOptions o = options(node);
      o.huge_pages = huge;
      const Mapped m(o);
      BOOST_TEST(all_at(where(m.range), node));
      // The file itself has the policy: the kernel keeps to it for whatever comes later.
      const Policy p = policy_of(m.address(), MPOL_F_ADDR);
      BOOST_TEST(p.mode == MPOL_BIND);
      BOOST_TEST(p.nodes[node.value / 64] == 1ul << (node.value % 64));
    }
  }
  BOOST_TEST((policy_of(nullptr, 0) == of_thread));
  HostOptions anywhere = options(NumaNode(0));
  anywhere.numa_node.reset();
  BOOST_TEST(policy_of(Mapped(anywhere).address(), MPOL_F_ADDR).mode == MPOL_DEFAULT);
}

BOOST_AUTO_TEST_CASE(hugetlb_frames_too, *boost::unit_test::precondition(numa_is_there)) {
  int tried = 0;
  for (const NumaNode node : nodes()) {
    HostOptions too_many = options(node, Hugetlb::always);
    too_many.capacity = HugetlbReserve(node, "").read().total + kPage;
    BOOST_TEST(throws_naming<CapacityError>([&] { make_host_backend(too_many); },
                                            "raise nr_hugepages of the node"));
    if (HugetlbReserve(node, "").read().available < kPage * 8) continue;
    const Mapped m(options(node, Hugetlb::always));
    BOOST_TEST(all_at(where(m.range), node));
    ++tried;
  }
  if (tried == 0) BOOST_TEST_MESSAGE("skipped: no node has 8 free huge pages (vm.nr_hugepages)");
}

// A thread that allocates for such a pool keeps its own policy, and that one does not matter.
BOOST_AUTO_TEST_CASE(a_threads_own_policy_stays, *boost::unit_test::precondition(numa_is_there)) {
  const int end = run_in_child([] {
    const NumaNode other = nodes().back(), node = nodes().front();
    NodeMask mask{};
    mask[other.value / 64] = 1ul << (other.value % 64);
    expect(syscall(SYS_set_mempolicy, MPOL_PREFERRED, mask.data(), kMaxNode) == 0, "preferred");
    const Policy before = policy_of(nullptr, 0);
    expect(before.mode == MPOL_PREFERRED, "it is in force");
    for (const Hugetlb hugetlb : {Hugetlb::never, Hugetlb::always}) {
      if (hugetlb == Hugetlb::always && HugetlbReserve(node, "").read().available < kPage * 8) {
        continue;
      }
      const Mapped m(options(node, hugetlb));
      expect(all_at(where(m.range), node), "on the pool's node");
      expect(policy_of(nullptr, 0) == before, "the thread's policy is as it was");
    }
  });
  BOOST_TEST(end == 0);
}

BOOST_AUTO_TEST_CASE(the_memory_of_the_node_is_the_limit,
                     *boost::unit_test::precondition(numa_is_there)) {
  HostOptions o = options(nodes().back());
  const MemoryInfo of_node = make_host_backend(o)->memory_info();
  o.numa_node.reset();
  const MemoryInfo of_machine = make_host_backend(o)->memory_info();
  BOOST_TEST(of_node.total.value <= of_machine.total.value);
  if (nodes().size() > 1) BOOST_TEST(of_node.total.value < of_machine.total.value);
  o.numa_node = nodes().back();
  o.capacity = kPage * (of_node.total.value / kPage.value + 1);
  BOOST_TEST(throws_naming<InvalidArgument>([&] { make_host_backend(o); }, "more than the"));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
