// The huge pages that an administrator has set aside: how many there are, how many are free, and
// what to say when there are too few. Of the kernel's sizes we use the one of 2 MiB.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/ids.hpp"

namespace kvspan {

inline constexpr Bytes kHugetlbPage{2ull << 20};

class HugetlbReserve {
 public:
  // Of the whole machine or of one node. `root` goes before /sys.
  HugetlbReserve(std::optional<NumaNode> node, std::string root);

  struct Reading {
    Bytes total;      // also what the kernel may set aside when asked (nr_overcommit_hugepages)
    Bytes available;  // of that, what nobody has or was promised
  };
  Reading read() const;  // zeros where the kernel has none of that size

  // How to have `size` in all: the setting's name and the command.
  std::string how_to_raise(Bytes size) const;

 private:
  std::uint64_t number(const char* name) const;

  std::string root_;
  std::string folder_;
  bool is_of_node_;
};

}  // namespace kvspan
