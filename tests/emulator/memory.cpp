#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "options.h"
#include "report.h"

namespace emulator {
namespace {

constexpr std::size_t kGarbage = 4096, kGarbageEvery = 65536;

constexpr std::size_t kHostPage = 4096;
constexpr std::uint64_t kFirstHandle = 0x5000'0000'0000;
constexpr std::uint64_t kHandleStep = 16;
// Above every address of a user process, so that a fictitious address can never be a real one.
constexpr Address kFictitiousBase = Address{1} << 48;
constexpr Address kFictitiousSize = Address{128} << 40;

Address up(Address value, Address multiple) { return (value + multiple - 1) / multiple * multiple; }

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

}  // namespace

Physical::Physical(std::size_t size, int memory) : size_bytes(size), fd(memory) {
  if (fd >= 0) return;
  void* at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  alias_ = static_cast<std::byte*>(at);
}

Physical::~Physical() {
  if (alias_ != nullptr) ::munmap(alias_, size_bytes);
  if (fd >= 0) ::close(fd);
}

std::byte* Physical::alias() {
  if (alias_ == nullptr) {
    void* at = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) alias_ = static_cast<std::byte*>(at);
  }
  return alias_;
}

bool Physical::map_at(Address at, std::size_t size, int protection) {
  if (fd >= 0)
    return ::mmap(pointer(at), size, protection, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
  // Memory without a name: an old size of 0 makes mremap duplicate a shared mapping.
  if (::mremap(alias_, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(at)) == MAP_FAILED)
    return false;
  return ::mprotect(pointer(at), size, protection) == 0;
}

void Memory::reset() {
  const auto n = static_cast<std::size_t>(options_.devices);
  used_bytes.assign(n, 0);
  mapped_handles.assign(n, 0);
  if (next_handle_ == 0) next_handle_ = kFirstHandle;
  next_fictitious_ = kFictitiousBase;
}

Address Memory::take_range(std::size_t size, std::size_t alignment, Address hint) {
  if (options_.memory_free) {
    if (size > kFictitiousSize) return 0;
    Address at = up(next_fictitious_, alignment);
    if (at + size > kFictitiousBase + kFictitiousSize) {
      at = kFictitiousBase;  // the far end is reached: the first gap that is large enough
      for (const auto& [base, length] : fictitious_) {
        if (at + size <= base) break;
        at = up(base + length, alignment);
      }
      if (at + size > kFictitiousBase + kFictitiousSize) return 0;
    } else {
      next_fictitious_ = at + size;
    }
    fictitious_[at] = size;
    return at;
  }
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (hint != 0 && hint % alignment == 0) {
    void* got = ::mmap(pointer(hint), size, PROT_NONE, flags, -1, 0);
    if (got == pointer(hint)) return hint;
    if (got != MAP_FAILED) ::munmap(got, size);
  }
  const std::size_t padded = size + alignment;
  if (padded < size) return 0;
  void* got = ::mmap(nullptr, padded, PROT_NONE, flags, -1, 0);
  if (got == MAP_FAILED) return 0;
  const auto from = reinterpret_cast<Address>(got);
  const Address at = up(from, alignment);
  if (at != from) ::munmap(got, at - from);
  if (at + size != from + padded) ::munmap(pointer(at + size), from + padded - at - size);
  return at;
}

void Memory::give_range(Address base, std::size_t size) {
  if (options_.memory_free) {
    fictitious_.erase(base);
  } else {
    ::munmap(pointer(base), size);
  }
}

std::uint64_t Memory::create(std::size_t size, const CUmemAllocationProp& properties, int device) {
  if (device >= 0 && used_bytes[static_cast<std::size_t>(device)] + size > options_.memory_bytes)
    return 0;
  Handle made;
  made.size_bytes = size;
  made.properties = properties;
  made.device = device;
  if (!options_.memory_free) {
    int fd = -1;
    if (properties.requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE) {
      fd = ::memfd_create(text("kvspan-emulator-%d", device).c_str(), MFD_CLOEXEC);
      if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(size)) != 0) {
        std::perror("kvspan emulator: memfd_create");
        if (fd >= 0) ::close(fd);
        return 0;
      }
    }
    made.physical = std::make_shared<Physical>(size, fd);
    made.physical->n_handles = 1;
    std::byte* const bytes = options_.garbage ? made.physical->alias() : nullptr;
    // A little of everything: touching all of the memory would be most of what a test takes.
    for (std::size_t at = 0; bytes != nullptr && at < size; at += kGarbageEvery) {
      std::fill_n(bytes + at, std::min(kGarbage, size - at), std::byte{0xa5});
    }
  }
  if (device >= 0) used_bytes[static_cast<std::size_t>(device)] += size;
  const std::uint64_t id = next_handle_;
  next_handle_ += kHandleStep;
  handles.emplace(id, std::move(made));
  return id;
}

std::uint64_t Memory::import(int fd) {
  // The memfd's name says which device it belongs to, its size how large the allocation is.
  char link[64];
  char name[64] = {};
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (::readlink(link, name, sizeof name - 1) <= 0) return 0;
  int device = -1;
  if (std::sscanf(name, "/memfd:kvspan-emulator-%d", &device) != 1) return 0;
  struct stat status{};
  if (device >= options_.devices || ::fstat(fd, &status) != 0) return 0;
  Handle made;
  made.size_bytes = static_cast<std::size_t>(status.st_size);
  made.device = device;
  made.imported = true;
  made.properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  made.properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  made.properties.location.id = device;
  made.properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  for (auto& [id, handle] : handles) {  // exported by this very process?
    struct stat own{};
    if (handle.physical == nullptr || handle.physical->fd < 0) continue;
    if (::fstat(handle.physical->fd, &own) != 0 || own.st_ino != status.st_ino ||
        own.st_dev != status.st_dev)
      continue;
    made.physical = handle.physical;
    break;
  }
  if (made.physical == nullptr) {
    const int mine = ::fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (mine < 0) return 0;
    made.physical = std::make_shared<Physical>(made.size_bytes, mine);
  }
  ++made.physical->n_handles;
  const std::uint64_t id = next_handle_;
  next_handle_ += kHandleStep;
  handles.emplace(id, std::move(made));
  return id;
}

Handle* Memory::handle(std::uint64_t id) {
  const auto at = handles.find(id);
  return at == handles.end() ? nullptr : &at->second;
}

bool Memory::existed(std::uint64_t id) const {
  return id >= kFirstHandle && id < next_handle_ && (id - kFirstHandle) % kHandleStep == 0;
}

void Memory::drop_if_unused(std::uint64_t id) {
  const auto at = handles.find(id);
  if (at == handles.end() || at->second.references != 0 || at->second.mappings != 0) return;
  Handle& handle = at->second;
  const bool last = handle.physical == nullptr || --handle.physical->n_handles == 0;
  // An importing process does not pay for the exporter's memory; a second handle of one process
  // keeps the first one's allocation charged.
  if (handle.device >= 0) {
    auto& used = used_bytes[static_cast<std::size_t>(handle.device)];
    if (!handle.imported && last) used -= handle.size_bytes;
    if (!handle.imported && !last) {
      for (auto& [other, heir] : handles) {
        if (other == id || heir.physical != handle.physical) continue;
        heir.imported = false;
        break;
      }
    }
  }
  handles.erase(at);
}

void Memory::map(Address at, std::size_t size, std::uint64_t id, Address reservation) {
  Handle& handle = handles.at(id);
  Mapping mapping;
  mapping.size_bytes = size;
  mapping.handle = id;
  mapping.reservation = reservation;
  mapping.device = handle.device;
  mapping.physical = handle.physical;
  mappings.emplace(at, std::move(mapping));
  ++handle.mappings;
  ++reservations.at(reservation).mappings;
  if (handle.device >= 0) ++mapped_handles[static_cast<std::size_t>(handle.device)];
  const auto alias = std::find_if(handle.aliases.begin(), handle.aliases.end(),
                                  [&](const auto& entry) { return entry.first == reservation; });
  if (alias == handle.aliases.end()) {
    handle.aliases.emplace_back(reservation, 1);
  } else {
    ++alias->second;
  }
}

void Memory::unmap(Mappings::iterator at) {
  const Mapping& mapping = at->second;
  const std::uint64_t id = mapping.handle;
  Handle& handle = handles.at(id);
  if (mapping.physical != nullptr && (options_.visible || mapping.host_access != 0)) {
    ::mmap(pointer(at->first), mapping.size_bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  --handle.mappings;
  --reservations.at(mapping.reservation).mappings;
  if (handle.device >= 0) --mapped_handles[static_cast<std::size_t>(handle.device)];
  const auto alias =
      std::find_if(handle.aliases.begin(), handle.aliases.end(),
                   [&](const auto& entry) { return entry.first == mapping.reservation; });
  if (--alias->second == 0) handle.aliases.erase(alias);
  mappings.erase(at);
  drop_if_unused(id);
}

bool Memory::apply_access(Address at, const Mapping& mapping) {
  if (mapping.physical == nullptr) return true;
  unsigned granted = mapping.host_access;
  if (options_.visible) {
    for (int device = 0; device < options_.devices; ++device) granted |= mapping.access_of(device);
  }
  if (!options_.visible && mapping.device >= 0 && granted == 0) return true;
  const int protection =
      (granted & 1U ? PROT_READ : PROT_NONE) | (granted & 2U ? PROT_WRITE : PROT_NONE);
  return mapping.physical->map_at(at, mapping.size_bytes, protection);
}

Memory::Mappings::iterator Memory::mapping_of(Address at) {
  auto next = mappings.upper_bound(at);
  if (next == mappings.begin()) return mappings.end();
  --next;
  return at - next->first < next->second.size_bytes ? next : mappings.end();
}

Memory::Reservations::iterator Memory::reservation_of(Address at) {
  auto next = reservations.upper_bound(at);
  if (next == reservations.begin()) return reservations.end();
  --next;
  return at - next->first < next->second.size_bytes ? next : reservations.end();
}

bool Memory::overlaps_mapping(Address at, std::size_t size) {
  if (mapping_of(at) != mappings.end()) return true;
  const auto next = mappings.upper_bound(at);
  return next != mappings.end() && next->first < at + size;
}

bool Memory::exactly(Address at, std::size_t size, Mappings::iterator* first,
                     Mappings::iterator* last, std::string* why) {
  auto mapping = mappings.find(at);
  *first = mapping;
  Address reached = at;
  const Address end = at + size;
  while (reached < end) {
    if (mapping == mappings.end() || mapping->first != reached) {
      *why = text(mapping_of(reached) != mappings.end() ? "0x%llx is inside a mapping"
                                                        : "0x%llx is not mapped",
                  static_cast<unsigned long long>(reached));
      return false;
    }
    reached += mapping->second.size_bytes;
    ++mapping;
  }
  if (reached != end) {
    *why = text("0x%llx is inside a mapping", static_cast<unsigned long long>(end));
    return false;
  }
  *last = mapping;
  return true;
}

bool Memory::is_device(Address at) {
  if (reservation_of(at) != reservations.end()) return true;
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return at >= kFictitiousBase;
  --next;
  return at - next->first < next->second.size_bytes || at >= kFictitiousBase;
}

bool Memory::resolve(Address at, std::size_t n, User user, bool write, std::vector<Piece>* pieces,
                     std::string* why) {
  const auto say = [&](Address where, const char* what) {
    *why = text("0x%llx %s", static_cast<unsigned long long>(where), what);
    return false;
  };
  while (n > 0) {
    Address base = 0;
    const Mapping* mapping = nullptr;
    if (const auto found = mapping_of(at); found != mappings.end()) {
      base = found->first;
      mapping = &found->second;
    } else if (auto next = allocations.upper_bound(at); next != allocations.begin()) {
      --next;
      if (at - next->first < next->second.size_bytes) {
        base = next->first;
        mapping = &next->second;
      }
    }
    if (mapping == nullptr) return say(at, "is not mapped");
    const bool is_reachable = user.copies && allocations.contains(base);
    if (user.device >= 0 && !is_reachable) {
      const unsigned access = mapping->access_of(user.device);
      if (access == 0) {
        return say(at, mapping->access == 0 ? "is mapped without access (no cuMemSetAccess)"
                                            : "may not be accessed from this device");
      }
      if (write && (access & 2U) == 0) return say(at, "is read-only");
    }
    const std::size_t offset = at - base;
    const std::size_t here = std::min(n, mapping->size_bytes - offset);
    if (pieces != nullptr) {
      Piece piece{mapping->physical, nullptr, here};
      if (piece.physical != nullptr) {
        std::byte* alias = piece.physical->alias();
        if (alias == nullptr) return say(at, "cannot be aliased: the emulator's host is full");
        piece.data = alias + offset;
      }
      pieces->push_back(std::move(piece));
    }
    at += here;
    n -= here;
  }
  return true;
}

Address Memory::allocate(std::size_t size, int device) {
  const std::size_t rounded = up(size, 512);
  auto& used = used_bytes[static_cast<std::size_t>(device)];
  if (used + rounded > options_.memory_bytes) return 0;
  const std::size_t reserved = up(rounded, kHostPage);
  Mapping mapping;
  mapping.size_bytes = rounded;
  mapping.device = device;
  mapping.access = 3U << (2 * device);
  if (!options_.memory_free) mapping.physical = std::make_shared<Physical>(reserved, -1);
  const Address at = take_range(reserved, kHostPage, 0);
  if (at == 0) return 0;
  if (options_.visible) mapping.physical->map_at(at, reserved, PROT_READ | PROT_WRITE);
  used += rounded;
  allocations.emplace(at, std::move(mapping));
  return at;
}

void Memory::deallocate(Mappings::iterator at) {
  used_bytes[static_cast<std::size_t>(at->second.device)] -= at->second.size_bytes;
  give_range(at->first, up(at->second.size_bytes, kHostPage));
  allocations.erase(at);
}

void* Memory::allocate_pinned(std::size_t size, unsigned flags, int device) {
  void* at = std::aligned_alloc(kHostPage, up(size, kHostPage));
  if (at != nullptr) pinned[reinterpret_cast<Address>(at)] = {size, flags, false, device};
  return at;
}

void Memory::free_pinned(std::map<Address, Pinned>::iterator at) {
  if (!at->second.registered) std::free(pointer(at->first));
  pinned.erase(at);
}

std::map<Address, Pinned>::iterator Memory::pinned_of(Address at, std::size_t n) {
  auto next = pinned.upper_bound(at);
  if (next == pinned.begin()) return pinned.end();
  --next;
  const std::size_t offset = at - next->first;
  return offset < next->second.size_bytes && n <= next->second.size_bytes - offset ? next
                                                                                   : pinned.end();
}

}  // namespace emulator
