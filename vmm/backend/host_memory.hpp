// How much memory the machine has left for us: /proc/meminfo, every cgroup (v1 or v2) from ours up
// to the root of what we can see, and the NUMA node, if all is to come from one. Asked before
// memory is allocated, because past these limits the kernel does not refuse: it kills.
//
// A look costs 20 to 50 us, so `admit` keeps what the last look allowed and looks again when that
// is used up or old. Threads: everything may be called from any thread.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "core/ids.hpp"

namespace kvspan {

struct MemoryReading {
  Bytes total;             // the smaller of the machine's memory and every cgroup's limit
  Bytes available;         // the smallest headroom among them
  std::string limited_by;  // where that is: a file, or the directory of a cgroup
};

class MemoryReader {
 public:
  // `root` is put before /proc and /sys: tests give a tree of their own.
  explicit MemoryReader(std::string root, std::optional<NumaNode> node = {});
  // Throws DriverError when /proc/meminfo cannot be read.
  MemoryReading read() const;

 private:
  struct Cgroup {
    std::string directory;
    bool is_v2;
  };
  static std::vector<Cgroup> find_cgroups(const std::string& root);
  void take_node_in(MemoryReading& reading) const;

  std::string root_;
  std::optional<NumaNode> node_;
  std::vector<Cgroup> cgroups_;  // ours first, then its ancestors
};

class MemoryGauge {
 public:
  static constexpr std::chrono::milliseconds kMaxAge{50};

  // Of what there is, `reserve` is left to others; 0 stands for 5% of the total, at least 256 MiB.
  MemoryGauge(Bytes reserve, std::string root, std::optional<NumaNode> node = {});

  // Memory that was admitted and is being allocated: until this goes, it is held against others who
  // ask, since a look in between would not see all of it.
  class Admission {
   public:
    Admission(MemoryGauge& gauge, Bytes size) : gauge_(&gauge), size_(size) {}
    Admission(const Admission&) = delete;
    Admission& operator=(const Admission&) = delete;
    ~Admission();

   private:
    MemoryGauge* gauge_;
    Bytes size_;
  };

  // Throws OutOfMemory unless `size` more bytes may be allocated now.
  [[nodiscard]] Admission admit(Bytes size);

  MemoryInfo info() const;
  Bytes reserve() const noexcept { return reserve_; }

 private:
  using Clock = std::chrono::steady_clock;

  Bytes less_reserve(Bytes available) const noexcept;

  const MemoryReader reader_;
  Bytes reserve_;

  std::mutex mutex_;  // guards what follows
  Bytes allowance_;
  Bytes in_flight_;
  Clock::time_point read_at_{};
};

}  // namespace kvspan
