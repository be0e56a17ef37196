// The host backend: frames are page-sized extents of one memfd, mapping is mmap(MAP_SHARED |
// MAP_FIXED) of such an extent, so two pages that map one frame really share memory. See
// backend.hpp for the contract and vmm/DESIGN.md for the kernel's behaviour that this relies on.
#pragma once

#include <memory>

#include "backend/backend.hpp"

namespace kvspan {

struct HostOptions {
  Bytes page_size{2ull << 20};  // power of two, 64 KiB to 64 MiB
  Bytes capacity{};             // the most memory that frames may take, a multiple of the page size
  SizeClass largest_class{};    // the largest frames that will be created
  bool huge_pages = true;       // ask the kernel for huge pages where a page is at least 2 MiB
  Bytes reserve{};              // of the machine's memory, left to others; 0 = 5%, at least 256 MiB
};

// Throws InvalidArgument (page size, capacity 0 or larger than the machine), CapacityError
// (RLIMIT_FSIZE and the like), DriverError.
std::unique_ptr<Backend> make_host_backend(const HostOptions& options);

}  // namespace kvspan
