#include "backend/host_mappings.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "backend/host_files.hpp"
#include "backend/host_fork.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr std::uint64_t kUsualMaxMapCount = 65'530;
// How far below the limit a refusal is put down to it: a call may need two more mappings, and other
// threads map and unmap between the refusal and the count.
constexpr std::uint64_t kMapCountSlack = 64;
constexpr std::size_t kSpareMappings = 16;

int protection_of(Unmapped unmapped) { return unmapped == Unmapped::zero ? PROT_READ : PROT_NONE; }

std::size_t os_page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// The soft limit, or nothing when there is none.
std::optional<Bytes> soft_limit(decltype(RLIMIT_AS) which) {
  rlimit limit{};
  if (getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  return Bytes(limit.rlim_cur);
}

[[noreturn]] void throw_address_space_error(Bytes size, int error_number) {
  if (error_number != ENOMEM) {
    throw system_error("mmap", error_number, "cannot reserve " + to_string(size));
  }
  if (const auto limit = soft_limit(RLIMIT_AS)) {
    throw CapacityError("cannot reserve " + to_string(size) +
                        " of address space: RLIMIT_AS limits this process to " + to_string(*limit) +
                        "; raise it (ulimit -v unlimited), or use fewer slots or positions");
  }
  throw CapacityError("cannot reserve " + to_string(size) +
                      ": the address space has no such range left; use fewer slots or positions");
}

}  // namespace

Memfd::Memfd(Bytes size, unsigned flags) : fd_(-1) {
  // Asked first: growing a file past RLIMIT_FSIZE does not fail, it kills the process by SIGXFSZ.
  if (const auto limit = soft_limit(RLIMIT_FSIZE); limit && *limit < size) {
    throw CapacityError("RLIMIT_FSIZE limits files of this process to " + to_string(*limit) +
                        ", and the pool's memory is a file in memory of nominally " +
                        to_string(size) + "; raise it (ulimit -f unlimited)");
  }
  fd_ = host_fork::open_memfd("kvspan", flags);
  if (fd_ < 0 && (errno == EMFILE || errno == ENFILE)) {
    throw CapacityError(
        std::string("no file descriptor is left for the pool's memory: ") +
        (errno == EMFILE ? "raise RLIMIT_NOFILE (ulimit -n)" : "raise the machine's fs.file-max"));
  }
  if (fd_ < 0) throw system_error("memfd_create", errno, "cannot make the pool's memory file");
  if (ftruncate(fd_, static_cast<off_t>(size.value)) != 0) {
    const int error_number = errno;
    host_fork::close_memfd(fd_);
    throw system_error("ftruncate", error_number,
                       "cannot size the pool's memory file to " + to_string(size));
  }
}

Memfd::~Memfd() { host_fork::close_memfd(fd_); }

Reservation::Reservation(Bytes size, Bytes alignment, Unmapped unmapped) : unmapped_(unmapped) {
  const Bytes more = size + alignment;  // some of which is given back at once, for alignment
  if (more < size) throw_address_space_error(size, ENOMEM);
  void* const got = mmap(nullptr, more.value, protection_of(unmapped), kReserveFlags, -1, 0);
  if (got == MAP_FAILED) throw_address_space_error(size, errno);

  const Address start(reinterpret_cast<std::uintptr_t>(got));
  const Address base(round_up(start.value, alignment.value));
  // Trimming a mapping at its ends cannot fail for want of anything; if it did, the rest is leaked
  // address space.
  if (base > start) munmap(got, (base - start).value);
  const Bytes behind = (start + more) - (base + size);
  if (behind > Bytes(0)) munmap(pointer(base + size), behind.value);
  range_ = {base, size};
  try {
    host_fork::guard_range(pointer(base), size.value);
  } catch (...) {
    munmap(pointer(base), size.value);
    throw;
  }
}

Reservation::~Reservation() {
  host_fork::forget_range(pointer(range_.base));
  munmap(pointer(range_.base), range_.size.value);
}

bool restore_unmapped(VirtualRange range, Unmapped unmapped) noexcept {
  return mmap(pointer(range.base), range.size.value, protection_of(unmapped),
              kReserveFlags | MAP_FIXED, -1, 0) != MAP_FAILED;
}

bool has_hole(VirtualRange range) noexcept {
  // msync(MS_ASYNC) does nothing but to look whether everything is mapped.
  return msync(pointer(range.base), range.size.value, MS_ASYNC) != 0 && errno == ENOMEM;
}

bool SpareMappings::hold() noexcept {
  // Relaxed: nothing is read through the pointer.
  if (base_.load(std::memory_order_relaxed) != nullptr) return true;
  std::scoped_lock lock(mutex_);
  if (base_.load(std::memory_order_relaxed) != nullptr) return true;
  const std::size_t page = os_page_size();
  void* const base = mmap(nullptr, kSpareMappings * page, PROT_NONE, kReserveFlags, -1, 0);
  if (base == MAP_FAILED) return false;
  // Neighbours with different protection cannot merge: a mapping each.
  for (std::size_t i = 1; i < kSpareMappings; i += 2) {
    if (mprotect(static_cast<char*>(base) + i * page, page, PROT_READ) != 0) {
      const int error_number = errno;
      munmap(base, kSpareMappings * page);
      errno = error_number;
      return false;
    }
  }
  base_.store(base, std::memory_order_relaxed);
  return true;
}

bool SpareMappings::give_up() noexcept {
  std::scoped_lock lock(mutex_);
  void* const base = base_.load(std::memory_order_relaxed);
  if (base == nullptr) return false;
  munmap(base, kSpareMappings * os_page_size());
  base_.store(nullptr, std::memory_order_relaxed);
  return true;
}

void throw_mapping_error(const std::string& call, int error_number, Bytes size) {
  if (error_number != ENOMEM) {
    throw system_error(call, error_number, "cannot map " + to_string(size));
  }
  const std::uint64_t limit = read_number("/proc/sys/vm/max_map_count").value_or(kUsualMaxMapCount);
  const std::uint64_t count = count_lines("/proc/self/maps");
  if (count + kMapCountSlack >= limit) {
    throw CapacityError("cannot map " + to_string(size) + ": this process has " +
                        std::to_string(count) + " memory mappings and vm.max_map_count allows " +
                        std::to_string(limit) + "; raise it (sysctl -w vm.max_map_count=" +
                        std::to_string(limit * 4) + "), or use larger pages");
  }
  throw OutOfMemory(size, Bytes(0), Bytes(0),
                    "the kernel has no memory for page tables (" + call +
                        " failed with ENOMEM): release sequences, or give the machine more memory");
}

}  // namespace kvspan
