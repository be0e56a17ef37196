// Where the memory of a host's frames comes from: a file in memory (memfd), whose extents are given
// memory and lose it again. There are two kinds.
//
// An ordinary file takes what the machine has free. The kernel is asked to lay it in huge pages;
// what it does not is small. How much there is, is looked up first, because past that the kernel
// does not refuse: it kills.
//
// A hugetlb file takes the huge pages that the administrator has set aside (vm.nr_hugepages), and
// nothing else. It never falls back: a fault without a free page would be SIGBUS, so an extent has
// all of its pages before it can be mapped, or is refused.
//
// Threads: everything may be called from any thread; calls on the same extent must not overlap.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.hpp"
#include "backend/host_backend.hpp"
#include "backend/host_huge.hpp"
#include "backend/host_mappings.hpp"
#include "core/ids.hpp"

namespace kvspan {

class FrameFile {
 public:
  FrameFile(Bytes size, unsigned memfd_flags) : file_(size, memfd_flags) {}
  FrameFile(const FrameFile&) = delete;
  FrameFile& operator=(const FrameFile&) = delete;
  virtual ~FrameFile() = default;

  int fd() const noexcept { return file_.fd(); }
  virtual bool is_hugetlb() const noexcept = 0;
  // Whether an extent may come out huge.
  virtual bool may_be_huge() const noexcept = 0;
  virtual MemoryInfo info() const = 0;

  // Gives an extent that has none its memory, all of it zeros, and says how much of it is huge.
  // Whoever gets an exception takes away (`punch`) what it may have by then.
  virtual HugeAllocation allocate(Bytes offset, Bytes size) = 0;
  // Takes an extent's memory away. False, with errno, if the kernel refuses.
  bool punch(Bytes offset, Bytes size) noexcept;

 private:
  const Memfd file_;
};

// A file of nominally `size` bytes for the frames of such a backend. `root` as in
// make_host_backend. Throws InvalidArgument and CapacityError if the machine cannot have so much.
std::unique_ptr<FrameFile> make_frame_file(const HostOptions& options, Bytes size,
                                           const std::string& root);

}  // namespace kvspan
