// The memory gauge, fed with /proc and cgroup trees of our own making.

#include <stdlib.h>

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "backend/child.hpp"
#include "backend/host_hugetlb.hpp"
#include "backend/host_internal.hpp"
#include "backend/host_memory.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

// A directory with files in it that goes with the test.
class Tree {
 public:
  Tree() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kvspan-XXXXXX").string();
    root_ = mkdtemp(pattern.data());
  }
  ~Tree() { std::filesystem::remove_all(root_); }

  Tree& write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return *this;
  }
  Tree& meminfo(Bytes total, Bytes available) {
    const auto kib = [](Bytes n) { return std::to_string(n.value / 1024) + " kB\n"; };
    return write("/proc/meminfo", "MemTotal:       " + kib(total) + "MemFree: 1 kB\n" +
                                      "MemAvailable:   " + kib(available) + "Shmem: 0 kB\n");
  }
  // A process in cgroup v2 `path`, whose hierarchy's directory `mount_root` is seen at
  // /sys/fs/cgroup.
  Tree& v2(const std::string& path, const std::string& mount_root = "/") {
    write("/proc/self/cgroup", "0::" + path + "\n");
    return write("/proc/self/mountinfo",
                 "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
                 "30 22 0:26 " +
                     mount_root +
                     " /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
  }
  Tree& group(const std::string& path, const std::string& max, Bytes current, Bytes cached) {
    const std::string at = "/sys/fs/cgroup" + path;
    write(at + "/memory.max", max + "\n");
    write(at + "/memory.current", std::to_string(current.value) + "\n");
    return write(at + "/memory.stat",
                 "anon 1\nfile 2\ninactive_anon 3\nactive_file 4\ninactive_file " +
                     std::to_string(cached.value) + "\n");
  }

  const std::string& root() const { return root_; }

 private:
  std::string root_;
};

std::string number(Bytes n) { return std::to_string(n.value); }

MemoryReading read(const Tree& tree) { return MemoryReader(tree.root()).read(); }

bool is(const MemoryReading& r, Bytes total, Bytes available) {
  BOOST_TEST_MESSAGE(to_string(r.total) << ", " << to_string(r.available) << ", " << r.limited_by);
  return r.total == total && r.available == available;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(host_memory)

BOOST_AUTO_TEST_CASE(without_cgroups_the_machine_is_the_limit) {
  Tree t;
  BOOST_CHECK_THROW(read(t), DriverError);
  t.meminfo(kGiB * 8, kGiB * 5);
  BOOST_TEST(is(read(t), kGiB * 8, kGiB * 5));
  BOOST_TEST(read(t).limited_by == "/proc/meminfo");
}

BOOST_AUTO_TEST_CASE(a_cgroup_of_v2_limits) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5).v2("/job").group("/job", number(kGiB * 2), kGiB, kMiB * 256);
  BOOST_TEST(is(read(t), kGiB * 2, kGiB + kMiB * 256));  // cached files count as available
  BOOST_TEST(read(t).limited_by == "/sys/fs/cgroup/job");
  t.group("/job", "max", kGiB, Bytes(0));
  BOOST_TEST(is(read(t), kGiB * 8, kGiB * 5));
  t.group("/job", number(kGiB * 2), kGiB * 3, Bytes(0));  // already over it
  BOOST_TEST(is(read(t), kGiB * 2, Bytes(0)));
}

BOOST_AUTO_TEST_CASE(ancestors_limit_too) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5).v2("/a/b/c");
  t.group("/a/b/c", "max", kGiB, Bytes(0));
  t.group("/a/b", number(kGiB * 4), kGiB, Bytes(0));
  t.group("/a", number(kGiB * 6), kGiB * 5, Bytes(0));  // fuller, though larger
  BOOST_TEST(is(read(t), kGiB * 4, kGiB));
  BOOST_TEST(read(t).limited_by == "/sys/fs/cgroup/a");
}

BOOST_AUTO_TEST_CASE(a_container_sees_its_own_part_of_the_tree) {
  {  // The path counts from the host's root, the mount shows only our directory.
    Tree t;
    t.meminfo(kGiB * 8, kGiB * 5).v2("/docker/4711", "/docker/4711");
    t.group("", number(kGiB * 3), kGiB, Bytes(0));
    BOOST_TEST(is(read(t), kGiB * 3, kGiB * 2));
  }
  {  // A cgroup namespace: the path leads out of what is mounted.
    Tree t;
    t.meminfo(kGiB * 8, kGiB * 5).v2("/../../elsewhere");
    t.group("", number(kGiB * 3), kGiB, Bytes(0));
    BOOST_TEST(is(read(t), kGiB * 3, kGiB * 2));
  }
}

BOOST_AUTO_TEST_CASE(cgroups_of_v1_limit) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5);
  t.write("/proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x/y\n0::/z\n");
  t.write("/proc/self/mountinfo",
          "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
          "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
          "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  const auto group = [&](const std::string& path, const std::string& limit, Bytes used) {
    const std::string at = "/sys/fs/cgroup/memory" + path;
    t.write(at + "/memory.limit_in_bytes", limit + "\n");
    t.write(at + "/memory.usage_in_bytes", number(used) + "\n");
    t.write(at + "/memory.stat", "inactive_file 5\ntotal_inactive_file 1048576\n");
  };
  group("", "9223372036854771712", kGiB);
  group("/x/y", "9223372036854771712", kGiB);
  BOOST_TEST(is(read(t), kGiB * 8, kGiB * 5));
  group("/x", number(kGiB * 2), kGiB);
  BOOST_TEST(is(read(t), kGiB * 2, kGiB + kMiB));
}

BOOST_AUTO_TEST_CASE(a_node_of_the_machine_limits) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5);
  const std::string path = "/sys/devices/system/node/node1/meminfo";
  t.write(path,
          "Node 1 MemTotal:       4194304 kB\nNode 1 MemFree:        1048576 kB\n"
          "Node 1 Active(file):    524288 kB\nNode 1 Inactive(file):  262144 kB\n"
          "Node 1 SReclaimable:    262144 kB\n");
  const MemoryReading of_node = MemoryReader(t.root(), NumaNode(1)).read();
  BOOST_TEST(is(of_node, kGiB * 4, kGiB + kMiB * 512));
  BOOST_TEST(of_node.limited_by == path);
  BOOST_TEST(is(read(t), kGiB * 8, kGiB * 5));
  t.meminfo(kGiB * 8, kMiB * 100);
  BOOST_TEST(is(MemoryReader(t.root(), NumaNode(1)).read(), kGiB * 4, kMiB * 100));
}

BOOST_AUTO_TEST_CASE(what_is_set_aside_of_huge_pages) {
  Tree t;
  const HugetlbReserve machine({}, t.root()), node(NumaNode(2), t.root());
  const auto is_of = [](const HugetlbReserve& r, unsigned total, unsigned available) {
    const auto now = r.read();
    return now.total == kMiB * (2 * total) && now.available == kMiB * (2 * available);
  };
  BOOST_TEST(is_of(machine, 0, 0));
  const auto write = [&](const std::string& of, const std::string& name, int n) {
    t.write("/sys/" + of + "/hugepages/hugepages-2048kB/" + name, std::to_string(n) + "\n");
  };
  write("kernel/mm", "nr_hugepages", 100);
  write("kernel/mm", "free_hugepages", 30);
  BOOST_TEST(is_of(machine, 100, 30));
  write("kernel/mm", "resv_hugepages", 10);  // promised to mappings that have not been touched
  BOOST_TEST(is_of(machine, 100, 20));
  write("kernel/mm", "nr_overcommit_hugepages", 16);
  write("kernel/mm", "surplus_hugepages", 4);  // 12 more may come
  BOOST_TEST(is_of(machine, 112, 32));
  write("devices/system/node/node2", "nr_hugepages", 7);
  write("devices/system/node/node2", "free_hugepages", 5);
  BOOST_TEST(is_of(node, 7, 5));
  BOOST_TEST(machine.how_to_raise(kMiB * 5) ==
             "raise vm.nr_hugepages (sysctl -w vm.nr_hugepages=3)");
  BOOST_TEST(node.how_to_raise(kMiB * 2).find("echo 1 > /sys/devices/system/node/node2/hugepages"
                                              "/hugepages-2048kB/nr_hugepages") !=
             std::string::npos);
}

BOOST_AUTO_TEST_CASE(huge_pages_that_are_not_free_are_not_chosen) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5);
  const std::string folder = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  t.write(folder + "nr_hugepages", "100\n").write(folder + "free_hugepages", "15\n");
  HostOptions o;
  o.page_size = kMiB * 2;
  o.capacity = kMiB * 32;
  o.hugetlb = Hugetlb::if_free;
  const auto b = make_host_backend(o, t.root());
  BOOST_TEST(b->memory_info().total.value == (kGiB * 8).value);
  b->create({FrameId(SizeClass(0), 0), 1});
  BOOST_TEST(b->huge_pages().hugetlb.value == 0u);
  t.write(folder + "free_hugepages", "16\n");
  o.reserve = kMiB;  // which is for the other case
  const auto enough = make_host_backend(o, t.root());
  BOOST_TEST(enough->memory_info().total.value == (kMiB * 200).value);
  BOOST_TEST(enough->memory_info().available.value == (kMiB * 32).value);
  o.page_size = kKiB * 64;
  BOOST_TEST(make_host_backend(o, t.root())->memory_info().total.value == (kGiB * 8).value);
}

BOOST_AUTO_TEST_CASE(some_memory_is_left_to_others) {
  Tree t;
  t.meminfo(kGiB * 100, kGiB * 50);
  const Bytes five_percent(kGiB.value * 100 / 100 * 5);
  BOOST_TEST(MemoryGauge(Bytes(0), t.root()).reserve().value == five_percent.value);
  BOOST_TEST(MemoryGauge(Bytes(0), t.root()).info().available.value ==
             (kGiB * 50 - five_percent).value);
  t.meminfo(kGiB, kMiB * 100);
  BOOST_TEST(MemoryGauge(Bytes(0), t.root()).reserve().value == (kMiB * 256).value);
  BOOST_TEST(MemoryGauge(Bytes(0), t.root()).info().available.value == 0u);
  BOOST_TEST(MemoryGauge(kMiB, t.root()).info().available.value == (kMiB * 99).value);
}

BOOST_AUTO_TEST_CASE(admissions_add_up) {
  Tree t;
  t.meminfo(kGiB * 8, kMiB * 101);
  MemoryGauge gauge(kMiB, t.root());
  {
    const auto first = gauge.admit(kMiB * 60);
    // Not enough is left for a second one, also after another look: the figures in /proc do not
    // show yet what the first is allocating.
    try {
      const auto second = gauge.admit(kMiB * 60);
      BOOST_ERROR("admitted");
    } catch (const OutOfMemory& e) {
      BOOST_TEST(e.requested().value == (kMiB * 60).value);
      BOOST_TEST(e.free().value == (kMiB * 40).value);
      BOOST_TEST(std::string(e.what()).find("/proc/meminfo") != std::string::npos);
    }
    const auto third = gauge.admit(kMiB * 40);
  }
  const auto whole = gauge.admit(kMiB * 100);  // nothing is in flight any more
}

BOOST_AUTO_TEST_CASE(what_was_read_grows_old) {
  Tree t;
  t.meminfo(kGiB * 8, kMiB * 101);
  MemoryGauge gauge(kMiB, t.root());
  static_cast<void>(gauge.admit(kMiB));
  t.meminfo(kGiB * 8, kMiB * 2);
  static_cast<void>(gauge.admit(kMiB * 50));  // of the allowance, without looking
  std::this_thread::sleep_for(MemoryGauge::kMaxAge * 2);
  BOOST_CHECK_THROW(static_cast<void>(gauge.admit(kMiB * 20)), OutOfMemory);
}

BOOST_AUTO_TEST_CASE(threads_are_admitted_no_more_than_there_is) {
  Tree t;
  t.meminfo(kGiB * 8, kMiB * 17);
  MemoryGauge gauge(kMiB, t.root());
  std::atomic<int> inside{0}, most{0}, refused{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        try {
          const auto admission = gauge.admit(kMiB * 6);
          const int now = ++inside;
          for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
          }
          std::this_thread::yield();
          --inside;
        } catch (const OutOfMemory&) {
          ++refused;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  BOOST_TEST(most >= 1);
  BOOST_TEST(most <= 2);
}

BOOST_AUTO_TEST_CASE(a_backend_asks_before_it_allocates) {
  Tree t;
  t.meminfo(kGiB * 8, kGiB * 5).v2("/job").group("/job", number(kMiB * 64), kMiB * 40, Bytes(0));
  HostOptions o;
  o.page_size = kMiB * 2;
  o.capacity = kMiB * 128;
  BOOST_TEST(throws_naming<InvalidArgument>([&] { make_host_backend(o, t.root()); }, "64 MiB"));
  o.capacity = kMiB * 64;
  o.reserve = kMiB * 4;
  const auto b = make_host_backend(o, t.root());
  BOOST_TEST(b->memory_info().total.value == (kMiB * 64).value);
  BOOST_TEST(b->memory_info().available.value == (kMiB * 20).value);
  b->create({FrameId(SizeClass(0), 0), 2});
  try {
    b->create({FrameId(SizeClass(0), 2), 11});
    BOOST_ERROR("created beyond the limit");
  } catch (const OutOfMemory& e) {
    BOOST_TEST(e.requested().value == (kMiB * 22).value);
    BOOST_TEST(e.free().value == (kMiB * 20).value);
    BOOST_TEST(std::string(e.what()).find("/sys/fs/cgroup/job") != std::string::npos);
  }
  const HugePages h = b->huge_pages();
  BOOST_TEST((h.huge + h.small).value == (kMiB * 4).value);
  b->create({FrameId(SizeClass(0), 2), 10});  // the ids are still to be had
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace kvspan::test
