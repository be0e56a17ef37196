#include "core/sizes.hpp"

#include <array>
#include <cstdio>

namespace kvspan {

std::string to_string(Bytes n) {
  static constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(n.value);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text{};
  const char* format = value == static_cast<double>(static_cast<std::uint64_t>(value)) ? "%.0f %s"
                       : value >= 100                                                  ? "%.0f %s"
                       : value >= 10                                                   ? "%.1f %s"
                                                                                       : "%.2f %s";
  std::snprintf(text.data(), text.size(), format, value, kUnits[unit]);
  return text.data();
}

}  // namespace kvspan
