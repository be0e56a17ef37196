// Frames of other backends that one of ours goes by: extents of files that are not our own.
//
// There are few, and most pools have none, so whoever maps or releases asks `any` first.
// Threads: everything may be called from any thread; calls on the same frame must not overlap.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

#include "backend/backend.hpp"

namespace kvspan {

class HostImports {
 public:
  struct Import {
    int fd;
    Bytes offset;
  };

  HostImports() = default;
  HostImports(const HostImports&) = delete;
  HostImports& operator=(const HostImports&) = delete;
  ~HostImports();

  // Keeps a descriptor of its own. Throws InvalidArgument unless the file has such an extent.
  void add(FrameId frame, const ExportedFrame& exported);
  // Whether the frame was an import.
  bool remove(FrameId frame) noexcept;
  std::optional<Import> find(FrameId frame) const noexcept;
  // Relaxed: whoever has a frame that is imported has been ordered after its import.
  bool any() const noexcept { return n_.load(std::memory_order_relaxed) != 0; }

 private:
  std::atomic<std::uint64_t> n_{0};
  mutable std::mutex mutex_;  // guards what follows
  std::map<FrameId, Import> imports_;
};

}  // namespace kvspan
