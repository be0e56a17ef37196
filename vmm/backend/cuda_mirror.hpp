// A mirror on a GPU: an array that the host fills, copied into device memory on the caller's
// stream.
//
// A copy reads its source when the stream comes to it, while the host goes on filling the next one;
// so what is published goes through a ring of pinned buffers, each with the fence of its last copy.
// A host that is a whole ring ahead of the stream waits.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"
#include "backend/cuda_mirror_memory.hpp"

namespace kvspan::cuda {

class CudaMirror final : public Mirror {
 public:
  // `owner` keeps the context, the fences and the memory; `own` is a stream that no caller orders.
  // Throws OutOfMemory, DriverError.
  CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences,
             MirrorMemory& memory, Bytes size, Stream own);
  ~CudaMirror() override;

  void* host() noexcept override { return bytes_.data(); }
  Address device() const noexcept override {
    return Address(static_cast<std::uintptr_t>(block_.device));
  }
  void publish(Stream stream) override;

 private:
  // Gives the block back, behind what reads it: kernels on the stream of the last publication.
  void tear_down() noexcept;

  std::shared_ptr<void> owner_;
  const std::uint64_t generation_;
  const Context& context_;
  Fences& fences_;
  MirrorMemory& memory_;
  std::vector<std::byte> bytes_;

  std::mutex mutex_;  // guards what follows
  MirrorBlock block_;
  std::size_t next_ = 0;  // of the block's buffers
  Stream last_;           // that something was published on
};

}  // namespace kvspan::cuda
