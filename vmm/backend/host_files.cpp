#include "backend/host_files.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>

namespace kvspan {

namespace {

// Calls f(data, size) for every piece of the file. False when it could not be read to its end.
template <class F>
bool for_each_piece(const char* path, F f) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  std::array<char, 4096> buffer;
  ssize_t n = 0;
  do {
    n = read(fd, buffer.data(), buffer.size());
    if (n > 0) f(buffer.data(), static_cast<std::size_t>(n));
  } while (n > 0 || (n < 0 && errno == EINTR));
  close(fd);
  return n == 0;
}

}  // namespace

std::optional<std::string> read_file(const std::string& path) {
  std::string text;
  if (!for_each_piece(path.c_str(), [&](const char* d, std::size_t n) { text.append(d, n); })) {
    return std::nullopt;
  }
  return text;
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  const auto text = read_file(path);
  std::uint64_t value = 0;
  if (!text ||
      std::from_chars(text->data(), text->data() + text->size(), value).ec != std::errc{}) {
    return std::nullopt;
  }
  return value;
}

std::uint64_t count_lines(const char* path) noexcept {
  std::uint64_t lines = 0;
  for_each_piece(path, [&](const char* d, std::size_t n) {
    lines += static_cast<std::uint64_t>(std::count(d, d + n, '\n'));
  });
  return lines;
}

}  // namespace kvspan
