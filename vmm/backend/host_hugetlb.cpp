#include "backend/host_hugetlb.hpp"

#include <algorithm>

#include "backend/host_files.hpp"
#include "core/sizes.hpp"

namespace kvspan {

HugetlbReserve::HugetlbReserve(std::optional<NumaNode> node, std::string root)
    : root_(std::move(root)), is_of_node_(node.has_value()) {
  const std::string size = "hugepages/hugepages-2048kB";
  folder_ = node ? "/sys/devices/system/node/node" + std::to_string(node->value) + "/" + size
                 : "/sys/kernel/mm/" + size;
}

std::uint64_t HugetlbReserve::number(const char* name) const {
  return read_number(root_ + folder_ + "/" + name).value_or(0);
}

HugetlbReserve::Reading HugetlbReserve::read() const {
  const std::uint64_t now = number("nr_hugepages"), free = number("free_hugepages");
  // A node has no figures of its own for these two.
  const std::uint64_t promised = number("resv_hugepages");
  const std::uint64_t overcommit = number("nr_overcommit_hugepages");
  const std::uint64_t surplus = number("surplus_hugepages");  // part of nr, and of overcommit
  const std::uint64_t more = overcommit - std::min(overcommit, surplus);
  return {kHugetlbPage * (now + more), kHugetlbPage * (free - std::min(free, promised) + more)};
}

std::string HugetlbReserve::how_to_raise(Bytes size) const {
  const std::string n = std::to_string(div_up(size.value, kHugetlbPage.value));
  return is_of_node_
             ? "raise nr_hugepages of the node (echo " + n + " > " + folder_ + "/nr_hugepages)"
             : "raise vm.nr_hugepages (sysctl -w vm.nr_hugepages=" + n + ")";
}

}  // namespace kvspan
