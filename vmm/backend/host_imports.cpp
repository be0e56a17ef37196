#include "backend/host_imports.hpp"

#include <sys/stat.h>

#include <cerrno>

#include "backend/host_fork.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

HostImports::~HostImports() {
  for (const auto& [frame, import] : imports_) host_fork::close_memfd(import.fd);
}

void HostImports::add(FrameId frame, const ExportedFrame& e) {
  struct stat status{};
  const auto size = [&] { return static_cast<std::uint64_t>(status.st_size); };
  if (fstat(e.fd, &status) != 0 || !S_ISREG(status.st_mode) || e.size.value > size() ||
      e.offset.value > size() - e.size.value) {
    throw InvalidArgument("descriptor " + std::to_string(e.fd) + " has no " + to_string(e.size) +
                          " at offset " + to_string(e.offset) +
                          ": import what export_frame gave, and close it only afterwards");
  }
  const std::scoped_lock lock(mutex_);
  const auto [it, is_new] = imports_.try_emplace(frame, Import{-1, e.offset});
  if (!is_new) throw InvalidArgument("a frame that is present already cannot be imported");
  int fd = -1, error_number = 0;
  try {
    fd = host_fork::duplicate_memfd(e.fd);
    error_number = errno;
  } catch (...) {
    imports_.erase(it);
    throw;
  }
  if (fd < 0) {
    imports_.erase(it);
    throw system_error("fcntl", error_number, "cannot keep the descriptor of an imported frame");
  }
  it->second.fd = fd;
  n_.fetch_add(1, std::memory_order_relaxed);
}

bool HostImports::remove(FrameId frame) noexcept {
  const std::scoped_lock lock(mutex_);
  const auto it = imports_.find(frame);
  if (it == imports_.end()) return false;
  host_fork::close_memfd(it->second.fd);
  imports_.erase(it);
  n_.fetch_sub(1, std::memory_order_relaxed);
  return true;
}

std::optional<HostImports::Import> HostImports::find(FrameId frame) const noexcept {
  const std::scoped_lock lock(mutex_);
  const auto it = imports_.find(frame);
  if (it == imports_.end()) return {};
  return it->second;
}

}  // namespace kvspan
