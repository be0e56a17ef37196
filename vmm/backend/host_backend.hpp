// The host backend: frames are page-sized extents of one memfd, mapping is mmap(MAP_SHARED |
// MAP_FIXED) of such an extent, so two pages that map one frame really share memory. See
// backend.hpp for the contract and vmm/DESIGN.md for the kernel's behaviour that this relies on.
#pragma once

#include <memory>
#include <optional>

#include "backend/backend.hpp"

namespace kvspan {

// Whether frames are made of the huge pages of 2 MiB that the administrator has set aside
// (vm.nr_hugepages); if so, of no others. `if_free`: if as many as the capacity are free when the
// backend is made.
enum class Hugetlb : std::uint8_t { never, always, if_free };

struct HostOptions {
  Bytes page_size{2ull << 20};  // power of two, 64 KiB to 64 MiB
  Bytes capacity{};             // the most memory that frames may take, a multiple of the page size
  SizeClass largest_class{};    // the largest frames that will be created
  bool huge_pages = true;       // ask the kernel for huge pages where a page is at least 2 MiB
  Hugetlb hugetlb = Hugetlb::never;
  std::optional<NumaNode> numa_node = {};  // where all frames come from
  Bytes reserve{};  // of the machine's memory, left to others; 0 = 5%, at least 256 MiB
};

// Throws InvalidArgument (page size, capacity 0 or larger than the machine, no such node),
// CapacityError (RLIMIT_FSIZE, vm.nr_hugepages and the like), DriverError.
std::unique_ptr<Backend> make_host_backend(const HostOptions& options);

}  // namespace kvspan
