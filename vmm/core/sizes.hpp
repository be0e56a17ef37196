// Arithmetic on sizes, and sizes as people write them.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "core/ids.hpp"

namespace kvspan {

inline constexpr Bytes kKiB{1024};
inline constexpr Bytes kMiB{1024 * 1024};
inline constexpr Bytes kGiB{1024ull * 1024 * 1024};

constexpr std::uint64_t div_up(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }
constexpr std::uint64_t round_up(std::uint64_t a, std::uint64_t b) { return div_up(a, b) * b; }
constexpr bool is_power_of_two(Bytes n) { return std::has_single_bit(n.value); }

constexpr Bytes size_of(Pages n, Bytes page_size) { return Bytes(n.value * page_size.value); }

// "2 MiB", "1.5 GiB", "640 B": three significant digits at most, for messages.
std::string to_string(Bytes n);

}  // namespace kvspan
