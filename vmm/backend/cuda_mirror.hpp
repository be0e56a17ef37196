// A mirror on a GPU: an array that the host fills, copied into device memory on the caller's
// stream.
//
// A copy reads its source when the stream comes to it, while the host goes on filling the next one;
// so what is published goes through a ring of pinned buffers, each with the fence of its last copy.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"

namespace kvspan::cuda {

class CudaMirror final : public Mirror {
 public:
  // `owner` keeps the context and the fences.
  CudaMirror(std::shared_ptr<void> owner, const Context& context, Fences& fences, Bytes size);
  ~CudaMirror() override;

  void* host() noexcept override { return bytes_.data(); }
  Address device() const noexcept override { return Address(static_cast<std::uintptr_t>(device_)); }
  void publish(Stream stream) override;

 private:
  struct Buffer {
    void* pinned = nullptr;
    Fence copied;
  };

  void free() noexcept;

  std::shared_ptr<void> owner_;
  const std::uint64_t generation_;
  const Context& context_;
  Fences& fences_;
  std::vector<std::byte> bytes_;
  CUdeviceptr device_ = 0;

  std::mutex mutex_;  // guards what follows
  std::array<Buffer, 8> ring_;
  std::size_t next_ = 0;
};

}  // namespace kvspan::cuda
