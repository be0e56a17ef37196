// What the kernel says of a mapping of ours.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

#include "core/ids.hpp"

namespace kvspan::test {

// The kernel's figure `key` for the mapping that starts at `at`, in bytes.
inline std::uint64_t smaps(Address at, const std::string& key) {
  std::ifstream file("/proc/self/smaps");
  std::ostringstream start;
  start << std::hex << at.value << '-';
  bool here = false;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(start.str())) here = true;
    if (here && line.starts_with(key)) return std::stoull(line.substr(key.size() + 1)) * 1024;
  }
  return 0;
}

}  // namespace kvspan::test
