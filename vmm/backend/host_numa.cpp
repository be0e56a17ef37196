#include "backend/host_numa.hpp"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <string>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

using NodeMask = std::array<unsigned long, 16>;
constexpr unsigned kBitsPerWord = sizeof(unsigned long) * CHAR_BIT;
constexpr unsigned kNodes = NodeMask().size() * kBitsPerWord;
constexpr unsigned long kMaxNode = kNodes + 1;  // the kernel takes one off

bool is_in(const NodeMask& nodes, unsigned node) {
  return (nodes[node / kBitsPerWord] >> (node % kBitsPerWord) & 1) != 0;
}

// "0, 2": the nodes whose memory this process may use. Empty if the kernel does not say.
std::string allowed_nodes() {
  NodeMask nodes{};
  if (syscall(SYS_get_mempolicy, nullptr, nodes.data(), kMaxNode, nullptr, MPOL_F_MEMS_ALLOWED) !=
      0) {
    return {};
  }
  std::string list;
  for (unsigned node = 0; node < kNodes; ++node) {
    if (is_in(nodes, node)) list += (list.empty() ? "" : ", ") + std::to_string(node);
  }
  return list;
}

[[noreturn]] void throw_no_such_node(NumaNode node) {
  const std::string allowed = allowed_nodes();
  throw InvalidArgument("numa_node " + std::to_string(node.value) +
                        " has no memory that this process may use; " +
                        (allowed.empty() ? "the kernel names none" : "there are: " + allowed));
}

[[noreturn]] void throw_numa_error(const char* call, int error_number, NumaNode node) {
  if (error_number == EINVAL) throw_no_such_node(node);
  std::string what = "cannot bind memory to NUMA node " + std::to_string(node.value);
  if (error_number == EPERM) {
    what +=
        ": the container's seccomp profile is in the way; give it CAP_SYS_NICE, or leave out "
        "numa_node";
  } else if (error_number == ENOSYS) {
    what += ": this kernel was built without NUMA";
  }
  throw system_error(call, error_number, what);
}

NodeMask mask_of(NumaNode node) {
  if (node.value >= kNodes) throw_no_such_node(node);
  NodeMask nodes{};
  nodes[node.value / kBitsPerWord] = 1ul << (node.value % kBitsPerWord);
  return nodes;
}

}  // namespace

void bind_file(int fd, Bytes size, NumaNode node) {
  const NodeMask nodes = mask_of(node);
  // The policy goes to the file through a mapping of it, and stays when that is gone.
  void* const all = mmap(nullptr, size.value, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (all == MAP_FAILED) {
    throw system_error("mmap", errno, "cannot bind " + to_string(size) + " to a NUMA node");
  }
  const long result = syscall(SYS_mbind, all, size.value, MPOL_BIND, nodes.data(), kMaxNode, 0u);
  const int error_number = errno;
  munmap(all, size.value);
  if (result != 0) throw_numa_error("mbind", error_number, node);
}

BoundThread::BoundThread(std::optional<NumaNode> node) {
  if (!node) return;
  const NodeMask nodes = mask_of(*node);
  if (syscall(SYS_get_mempolicy, &mode_before_, nodes_before_.data(), kMaxNode, nullptr, 0ul) !=
      0) {
    throw_numa_error("get_mempolicy", errno, *node);
  }
  if (syscall(SYS_set_mempolicy, MPOL_BIND, nodes.data(), kMaxNode) != 0) {
    throw_numa_error("set_mempolicy", errno, *node);
  }
  is_bound_ = true;
}

BoundThread::~BoundThread() {
  // What was in force before is allowed again.
  if (is_bound_) syscall(SYS_set_mempolicy, mode_before_, nodes_before_.data(), kMaxNode);
}

}  // namespace kvspan
