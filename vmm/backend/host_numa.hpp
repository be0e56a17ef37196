// Which NUMA node a file's memory comes from. glibc has no functions for this and libnuma is not
// asked for: they are three system calls.
//
// An ordinary file keeps a policy of its own, so it is bound once, and the kernel's balancing and
// swapping keep to it too. The kernel has no such policy for hugetlb files: there the thread that
// allocates is bound while it does.
#pragma once

#include <array>
#include <optional>

#include "core/ids.hpp"

namespace kvspan {

// All memory that an ordinary memfd of `size` bytes is given from now on is the node's. Throws
// InvalidArgument if the node has no memory for this process, DriverError if the kernel refuses.
void bind_file(int fd, Bytes size, NumaNode node);

// Binds what the calling thread allocates to the node, if there is one, while this lives. Throws as
// `bind_file`.
class BoundThread {
 public:
  explicit BoundThread(std::optional<NumaNode> node);
  BoundThread(const BoundThread&) = delete;
  BoundThread& operator=(const BoundThread&) = delete;
  ~BoundThread();

 private:
  bool is_bound_ = false;
  int mode_before_ = 0;
  std::array<unsigned long, 16> nodes_before_{};  // 1,024: the most that Linux is built for
};

}  // namespace kvspan
