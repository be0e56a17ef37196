// Reading the small text files in which Linux tells its state and limits.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace kvspan {

// The whole file, or nothing when it cannot be read.
std::optional<std::string> read_file(const std::string& path);

// The number that the file starts with, or nothing.
std::optional<std::uint64_t> read_number(const std::string& path);

// How many lines the file has (0 when it cannot be read); needs no memory of its own.
std::uint64_t count_lines(const char* path) noexcept;

}  // namespace kvspan
