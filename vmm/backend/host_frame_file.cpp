#include "backend/host_frame_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "backend/host_hugetlb.hpp"
#include "backend/host_memory.hpp"
#include "backend/host_numa.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)  // glibc has it behind linux/memfd.h
#endif

namespace kvspan {

namespace {

// A signal makes shmem undo a whole fallocate. In pieces, a timer that fires every few milliseconds
// (a profiler's) costs a piece and not the run.
constexpr Bytes kAllocationPiece = kMiB * 8;

// Allocates an extent of a file. False, with errno, may leave a part of it allocated.
bool allocate_all(int fd, Bytes offset, Bytes size) noexcept {
  for (Bytes done{}; done < size;) {
    const Bytes piece = std::min(kAllocationPiece, size - done);
    if (fallocate(fd, 0, static_cast<off_t>((offset + done).value),
                  static_cast<off_t>(piece.value)) == 0) {
      done += piece;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

[[noreturn]] void throw_refused(int error_number, Bytes size, Bytes available,
                                const std::string& what_to_do) {
  if (error_number != ENOSPC && error_number != ENOMEM) {
    throw system_error("fallocate", error_number, "cannot allocate " + to_string(size));
  }
  throw OutOfMemory(size, available, Bytes(0), what_to_do);
}

std::string why_no_huge_pages(const HostOptions& o) {
  if (!o.huge_pages) return "huge pages are turned off";
  if (o.page_size < huge_page_size()) {
    return "pages of " + to_string(o.page_size) + " are smaller than a huge page of " +
           to_string(huge_page_size());
  }
  return {};
}

class OrdinaryFile final : public FrameFile {
 public:
  OrdinaryFile(const HostOptions& o, Bytes size, std::unique_ptr<MemoryGauge> gauge)
      : FrameFile(size, 0), no_huge_pages_(why_no_huge_pages(o)), gauge_(std::move(gauge)) {
    if (o.numa_node) bind_file(fd(), size, *o.numa_node);
  }

  bool is_hugetlb() const noexcept override { return false; }
  bool may_be_huge() const noexcept override { return no_huge_pages_.empty(); }
  MemoryInfo info() const override { return gauge_->info(); }

  HugeAllocation allocate(Bytes offset, Bytes size) override {
    const auto admission = gauge_->admit(size);
    HugeAllocation huge{Bytes(0), no_huge_pages_};
    if (may_be_huge()) huge = allocate_huge(fd(), offset, size);
    if (huge.size < size && !allocate_all(fd(), offset + huge.size, size - huge.size)) {
      const int error_number = errno;
      throw_refused(error_number, size, gauge_->info().available,
                    "the kernel refused the memory: release sequences, trim the pool, or give the "
                    "process more memory");
    }
    return huge;
  }

 private:
  const std::string no_huge_pages_;  // why none are asked for; empty when they are
  const std::unique_ptr<MemoryGauge> gauge_;
};

class HugetlbFile final : public FrameFile {
 public:
  HugetlbFile(const HostOptions& o, Bytes size, HugetlbReserve reserve)
      : FrameFile(size, MFD_HUGETLB | MFD_HUGE_2MB),
        node_(o.numa_node),
        reserve_(std::move(reserve)) {}

  bool is_hugetlb() const noexcept override { return true; }
  bool may_be_huge() const noexcept override { return true; }
  MemoryInfo info() const override {
    const auto now = reserve_.read();
    return {now.total, now.available};
  }

  HugeAllocation allocate(Bytes offset, Bytes size) override {
    const BoundThread bound(node_);
    if (!allocate_all(fd(), offset, size)) {
      const int error_number = errno;
      const auto now = reserve_.read();
      throw_refused(error_number, size, now.available,
                    "the huge pages that the machine has set aside (" + to_string(now.total) +
                        ") are in use: release sequences, trim the pool, or " +
                        reserve_.how_to_raise(now.total + size) +
                        "; a cgroup may limit them as well (hugetlb.2MB.max)");
    }
    return {size, ""};
  }

 private:
  const std::optional<NumaNode> node_;
  const HugetlbReserve reserve_;
};

std::unique_ptr<FrameFile> make_hugetlb_file(const HostOptions& o, Bytes size,
                                             HugetlbReserve reserve) {
  if (o.page_size < kHugetlbPage) {
    throw InvalidArgument("pages of " + to_string(o.page_size) + " cannot be mapped out of huge " +
                          "pages of " + to_string(kHugetlbPage) +
                          ": take a page_size of at least that, or leave out hugetlb");
  }
  if (o.hugetlb == Hugetlb::always && o.reserve != Bytes(0)) {
    throw InvalidArgument(
        "reserve leaves ordinary memory to others, and hugetlb pages are none: leave it out");
  }
  const Bytes total = reserve.read().total;
  if (o.capacity > total) {
    throw CapacityError("capacity is " + to_string(o.capacity) + " and the machine has set aside " +
                        to_string(total) + " of huge pages of " + to_string(kHugetlbPage) + ": " +
                        reserve.how_to_raise(o.capacity) + ", or use huge_pages=True");
  }
  return std::make_unique<HugetlbFile>(o, size, std::move(reserve));
}

bool wants_hugetlb(const HostOptions& o, const HugetlbReserve& reserve) {
  if (o.hugetlb != Hugetlb::if_free) return o.hugetlb == Hugetlb::always;
  return o.page_size >= kHugetlbPage && reserve.read().available >= o.capacity;
}

}  // namespace

bool FrameFile::punch(Bytes offset, Bytes size) noexcept {
  int result = 0;
  do {
    result = fallocate(fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       static_cast<off_t>(offset.value), static_cast<off_t>(size.value));
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

std::unique_ptr<FrameFile> make_frame_file(const HostOptions& o, Bytes size,
                                           const std::string& root) {
  const BoundThread there_is_such_a_node(o.numa_node);
  HugetlbReserve reserve(o.numa_node, root);
  if (wants_hugetlb(o, reserve)) return make_hugetlb_file(o, size, std::move(reserve));
  auto gauge = std::make_unique<MemoryGauge>(o.reserve, root, o.numa_node);
  const Bytes machine = gauge->info().total;
  if (o.capacity > machine) {
    throw InvalidArgument("capacity is " + to_string(o.capacity) + ", more than the " +
                          to_string(machine) + " of memory that this process may use");
  }
  return std::make_unique<OrdinaryFile>(o, size, std::move(gauge));
}

}  // namespace kvspan
