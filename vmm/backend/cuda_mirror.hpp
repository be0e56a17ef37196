// A mirror on a GPU: an array that the host fills, copied into device memory on the caller's
// stream.
//
// A copy reads its source when the stream comes to it, while the host goes on filling the next one;
// so what is published goes through a ring of pinned buffers, each with the fence of its last copy.
// A host that is a whole ring ahead of the stream waits.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"

namespace kvspan::cuda {

class CudaMirror final : public Mirror {
 public:
  // `owner` keeps the context and the fences. Throws OutOfMemory, DriverError.
  CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences, Bytes size);
  ~CudaMirror() override;

  void* host() noexcept override { return bytes_.data(); }
  Address device() const noexcept override { return Address(static_cast<std::uintptr_t>(device_)); }
  void publish(Stream stream) override;

 private:
  static constexpr std::size_t kBuffers = 8;

  void allocate(Bytes size);
  // Waits for the copies that read the ring, and gives everything back.
  void tear_down() noexcept;

  std::shared_ptr<void> owner_;
  const std::uint64_t generation_;
  const Context& context_;
  Fences& fences_;
  std::vector<std::byte> bytes_;
  CUdeviceptr device_ = 0;
  std::byte* pinned_ = nullptr;  // the ring's buffers, one behind the other

  std::mutex mutex_;  // guards what follows
  std::array<Fence, kBuffers> copied_{};
  std::size_t next_ = 0;
};

}  // namespace kvspan::cuda
