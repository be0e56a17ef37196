#include "backend/host_huge.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "backend/host_files.hpp"
#include "core/sizes.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // glibc 2.35
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // glibc 2.37
#endif

namespace kvspan {

namespace {

// A view of a file's extent at an address aligned to a huge page, for MADV_COLLAPSE to look
// through. It can be read only once it is not inherited: a fork in the meantime hands no child a
// mapping of the frames.
class Window {
 public:
  Window(int fd, Bytes offset, Bytes size) : size_(size.value + huge_page_size().value) {
    around_ = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (around_ == MAP_FAILED) return;
    const std::uint64_t start = reinterpret_cast<std::uintptr_t>(around_);
    void* const at = reinterpret_cast<void*>(round_up(start, huge_page_size().value));
    if (mmap(at, size.value, PROT_NONE, MAP_SHARED | MAP_FIXED, fd,
             static_cast<off_t>(offset.value)) == MAP_FAILED) {
      return;
    }
    if (madvise(at, size.value, MADV_DONTFORK) == 0 && mprotect(at, size.value, PROT_READ) == 0) {
      base_ = static_cast<char*>(at);
    }
  }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  ~Window() {
    if (around_ != MAP_FAILED) munmap(around_, size_);
  }

  char* base() const { return base_; }  // null, with errno, when there is none

 private:
  std::size_t size_;
  void* around_ = MAP_FAILED;
  char* base_ = nullptr;
};

std::string why(int error_number) {
  switch (error_number) {
    case EINVAL:
      return "MADV_COLLAPSE failed with EINVAL: the kernel is older than 6.1, or huge pages are "
             "turned off for this process (PR_SET_THP_DISABLE)";
    case ENOMEM:
      return "MADV_COLLAPSE failed with ENOMEM: no unfragmented memory for a huge page";
    default:
      return "MADV_COLLAPSE failed: " + std::generic_category().message(error_number);
  }
}

}  // namespace

Bytes huge_page_size() {
  static const Bytes size(
      read_number("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").value_or(kMiB.value * 2));
  return size;
}

HugeAllocation allocate_huge(int fd, Bytes offset, Bytes size) {
  const Window window(fd, offset, size);
  if (window.base() == nullptr) {
    return {Bytes(0), "no mapping to collapse through: " + std::generic_category().message(errno)};
  }
  const auto seed_size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (Bytes done{}; done < size; done += huge_page_size()) {
    char* const at = window.base() + done.value;
    // One small page is enough to collapse; the kernel clears the rest, which is quicker than
    // allocating all of it in small pages and copying. Linux 6.1 wants the page mapped as well.
    int result = madvise(at, seed_size, MADV_POPULATE_READ);
    // EAGAIN and EBUSY are the kernel's "just now not": a page that another core has yet to let go.
    for (int attempt = 0; result == 0 && attempt < 3; ++attempt) {
      result = madvise(at, huge_page_size().value, MADV_COLLAPSE);
      if (result == 0 || (errno != EAGAIN && errno != EBUSY)) break;
      result = attempt < 2 ? 0 : result;
    }
    if (result != 0) return {done, why(errno)};
  }
  return {size, ""};
}

}  // namespace kvspan
