// A counter of the processor's, where the kernel gives one to this process; many machines (virtual
// ones, containers) do not.
#pragma once

#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

namespace kvspan::bench {

class DtlbMisses {
 public:
  DtlbMisses() {
    perf_event_attr wanted{};
    wanted.size = sizeof wanted;
    wanted.type = PERF_TYPE_HW_CACHE;
    wanted.config = PERF_COUNT_HW_CACHE_DTLB | (PERF_COUNT_HW_CACHE_OP_READ << 8) |
                    (PERF_COUNT_HW_CACHE_RESULT_MISS << 16);
    wanted.exclude_kernel = 1;
    wanted.exclude_hv = 1;
    fd_ = static_cast<int>(syscall(SYS_perf_event_open, &wanted, 0, -1, -1, 0));
    if (fd_ < 0) why_not_ = std::string("perf_event_open: ") + std::strerror(errno);
  }
  DtlbMisses(const DtlbMisses&) = delete;
  DtlbMisses& operator=(const DtlbMisses&) = delete;
  ~DtlbMisses() {
    if (fd_ >= 0) close(fd_);
  }

  const std::string& why_not() const { return why_not_; }  // empty when it counts
  std::uint64_t count() const {                            // 0 when it does not
    std::uint64_t n = 0;
    return read(fd_, &n, sizeof n) == sizeof n ? n : 0;
  }

 private:
  int fd_ = -1;
  std::string why_not_;
};

}  // namespace kvspan::bench
