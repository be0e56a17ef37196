// Memory of a file in huge pages. shmem's own setting for huge pages is "never" on most machines
// and belongs to root; MADV_COLLAPSE (Linux 6.1) works whatever it says. See vmm/DESIGN.md for what
// was measured: it is not only better to read and to unmap, it is also the fastest way to allocate.
#pragma once

#include <cstdint>
#include <string>

#include "core/ids.hpp"

namespace kvspan {

// The size of a huge page here.
Bytes huge_page_size();

struct HugeAllocation {
  Bytes size;           // how much, from the start, now has memory, all of it in huge pages
  std::string refusal;  // why it is not all
};

// Gives [offset, offset + size) of the file its memory as huge pages, as far as the kernel does.
// Both are multiples of the huge page size, and nothing of it has memory. What is behind the
// returned size may have some.
HugeAllocation allocate_huge(int fd, Bytes offset, Bytes size);

}  // namespace kvspan
