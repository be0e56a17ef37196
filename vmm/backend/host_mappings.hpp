// What the host backend owns of the kernel's, one handle a resource: the memfd, a reserved range,
// and a few spare mappings for bad times. The order of members in the backend is their teardown's.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>

#include "backend/backend.hpp"
#include "core/ids.hpp"

namespace kvspan {

inline void* pointer(Address a) { return reinterpret_cast<void*>(a.value); }

// A memfd of `size` bytes without memory behind them. Children of fork(2) do not keep it.
class Memfd {
 public:
  // `flags` of memfd_create. Throws CapacityError when RLIMIT_FSIZE or the descriptors do not allow
  // it, DriverError else.
  Memfd(Bytes size, unsigned flags);
  Memfd(const Memfd&) = delete;
  Memfd& operator=(const Memfd&) = delete;
  ~Memfd();

  int fd() const noexcept { return fd_; }

 private:
  int fd_;
};

// Address space without memory behind it: zeros that can be read, or nothing that can.
class Reservation {
 public:
  // Throws CapacityError, which names RLIMIT_AS if that is what is in the way.
  Reservation(Bytes size, Bytes alignment, Unmapped unmapped);
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  // Unmaps everything in it, what is backed too.
  ~Reservation();

  VirtualRange range() const noexcept { return range_; }
  Unmapped unmapped() const noexcept { return unmapped_; }

 private:
  VirtualRange range_;
  Unmapped unmapped_;
};

// Makes pages of a reservation as they were when it was new. False, with errno, leaves them as they
// are, or (a kernel out of memory at the wrong moment) gone: see `has_hole`.
bool restore_unmapped(VirtualRange range, Unmapped unmapped) noexcept;

// Whether some of the range is not mapped at all, not even as a reservation.
bool has_hole(VirtualRange range) noexcept;

// mmap is how pages are unbacked, and a process that has reached vm.max_map_count cannot mmap any
// more: it could not even give back what fills its table. So a few mappings are held that serve
// nothing and are given up then. Nothing is mapped while they are not held, so that the next time
// finds them again. Threads: safe.
class SpareMappings {
 public:
  SpareMappings() = default;
  SpareMappings(const SpareMappings&) = delete;
  SpareMappings& operator=(const SpareMappings&) = delete;
  ~SpareMappings() { give_up(); }

  // Takes them unless they are held; false, with errno, if the process has no mapping to spare.
  bool hold() noexcept;
  // Gives them up. False when they are not held.
  bool give_up() noexcept;

 private:
  std::mutex mutex_;                  // guards base_ while it changes
  std::atomic<void*> base_{nullptr};  // read without the mutex to see that they are held
};

// Throws what a failed mmap or mprotect means: CapacityError that names vm.max_map_count if the
// process is near it, OutOfMemory for want of page tables, DriverError for the rest.
[[noreturn]] void throw_mapping_error(const std::string& call, int error_number, Bytes size);

}  // namespace kvspan
