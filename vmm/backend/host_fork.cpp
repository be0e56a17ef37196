#include "backend/host_fork.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <vector>

#include "core/errors.hpp"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace kvspan::host_fork {

namespace {

struct Range {
  void* base;
  std::size_t size;
};

struct Registry {
  std::mutex mutex;  // guards the two below; held by fork(2) between `prepare` and its return
  std::vector<Range> ranges;
  std::vector<int> fds;
};

// Never destroyed: a thread may fork while statics are being torn down.
Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::atomic<std::uint64_t> current_generation{0};

bool seal(const Range& r) noexcept {
  return mmap(r.base, r.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
              -1, 0) != MAP_FAILED;
}

void prepare() { registry().mutex.lock(); }

void parent() { registry().mutex.unlock(); }

// Only what is async-signal-safe: another thread of the parent may have held any lock but ours.
void child() {
  Registry& r = registry();
  // A parent at vm.max_map_count: every sealed range frees mappings for the next, so go round
  // again; what cannot be sealed even then is unmapped, which traps as well.
  for (int round = 0; round < 2; ++round) {
    std::erase_if(r.ranges, [](const Range& range) { return seal(range); });
  }
  for (const Range& range : r.ranges) munmap(range.base, range.size);
  for (const int fd : r.fds) close(fd);
  r.ranges.clear();
  r.fds.clear();
  // Relaxed: the child has one thread, and starting others orders this before them.
  current_generation.fetch_add(1, std::memory_order_relaxed);
  r.mutex.unlock();
}

void install_handlers() {
  static const int error = pthread_atfork(prepare, parent, child);
  if (error != 0) throw system_error("pthread_atfork", error, "cannot protect memory from forks");
}

}  // namespace

std::uint64_t generation() noexcept { return current_generation.load(std::memory_order_relaxed); }

std::uint64_t watch() {
  install_handlers();
  return generation();
}

void guard_range(void* base, std::size_t size) {
  install_handlers();
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  r.ranges.push_back({base, size});
}

void forget_range(void* base) noexcept {
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  std::erase_if(r.ranges, [&](const Range& range) { return range.base == base; });
}

int open_memfd(const char* name, unsigned flags) {
  install_handlers();
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  r.fds.reserve(r.fds.size() + 1);  // so that nothing throws once the descriptor is there
  flags |= MFD_CLOEXEC;
  int fd = memfd_create(name, flags | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) fd = memfd_create(name, flags);  // before Linux 6.3
  if (fd >= 0) r.fds.push_back(fd);
  return fd;
}

int duplicate_memfd(int fd) {
  install_handlers();
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  r.fds.reserve(r.fds.size() + 1);
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (copy >= 0) r.fds.push_back(copy);
  return copy;
}

void close_memfd(int fd) noexcept {
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  std::erase(r.fds, fd);
  close(fd);
}

}  // namespace kvspan::host_fork
