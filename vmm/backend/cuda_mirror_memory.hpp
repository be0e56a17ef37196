// The memory of mirrors: used again, and given back only with the backend. Allocating and freeing
// device and pinned memory may wait for everything that the device is doing, and batches come and
// go with every change of their rows.
//
// A block that is not used any more serves again when its fences have been passed: those of the
// copies out of its pinned buffers, and one behind whatever reads its device memory.
//
// Threads: everything may be called from any thread, with the context current.
#pragma once

#include <array>
#include <cstddef>
#include <mutex>
#include <vector>

#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"

namespace kvspan::cuda {

struct MirrorBlock {
  static constexpr std::size_t kBuffers = 8;

  Bytes size{};
  CUdeviceptr device = 0;
  std::byte* pinned = nullptr;           // the buffers, one behind the other
  std::array<Fence, kBuffers> copied{};  // of each buffer's last copy
  Fence read{};                          // behind the device memory's last reader,
  bool is_read_known = true;             // unless that could not be recorded
};

class MirrorMemory {
 public:
  MirrorMemory(const Context& context, Fences& fences) : context_(context), fences_(fences) {}
  MirrorMemory(const MirrorMemory&) = delete;
  MirrorMemory& operator=(const MirrorMemory&) = delete;
  ~MirrorMemory();

  // A block of `size` bytes or more. Throws OutOfMemory, DriverError.
  MirrorBlock take(Bytes size);
  void give(const MirrorBlock& block) noexcept;

 private:
  bool is_idle(const MirrorBlock& block) noexcept;
  MirrorBlock allocate(Bytes size);
  void free(const MirrorBlock& block) noexcept;

  const Context& context_;
  Fences& fences_;
  std::mutex mutex_;  // guards what follows
  std::size_t n_out_ = 0;
  std::vector<MirrorBlock> given_;  // with room for all that are out: giving cannot fail
};

}  // namespace kvspan::cuda
