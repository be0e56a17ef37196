#include "backend/cuda_mirror_memory.hpp"

#include <algorithm>
#include <bit>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

namespace {

constexpr std::uint64_t kSmallest = 512;

}  // namespace

MirrorMemory::~MirrorMemory() {
  const Current current(context_, std::nothrow);
  for (const MirrorBlock& block : given_) {
    // What somebody may still read leaks.
    if (is_idle(block) || context_.api().cuCtxSynchronize() == CUDA_SUCCESS) free(block);
  }
}

MirrorBlock MirrorMemory::take(Bytes size) {
  const Bytes rounded(std::max(kSmallest, std::bit_ceil(size.value)));
  const std::scoped_lock lock(mutex_);
  const auto it = std::ranges::find_if(
      given_, [&](const MirrorBlock& b) { return b.size == rounded && is_idle(b); });
  MirrorBlock block;
  if (it != given_.end()) {
    block = *it;
    given_.erase(it);
  } else {
    given_.reserve(given_.size() + n_out_ + 1);
    block = allocate(rounded);
  }
  ++n_out_;
  return block;
}

void MirrorMemory::give(const MirrorBlock& block) noexcept {
  const std::scoped_lock lock(mutex_);
  --n_out_;
  given_.push_back(block);
}

bool MirrorMemory::is_idle(const MirrorBlock& block) noexcept {
  return block.is_read_known && fences_.is_passed(block.read) &&
         std::ranges::all_of(block.copied, [&](Fence f) { return fences_.is_passed(f); });
}

MirrorBlock MirrorMemory::allocate(Bytes size) {
  const Driver& api = context_.api();
  const auto require = [&](CUresult result, const char* call, Bytes asked) {
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      std::size_t free = 0, total = 0;
      api.cuMemGetInfo(&free, &total);  // for the message only: zero where it fails
      throw OutOfMemory(asked, Bytes(free), Bytes(0),
                        std::string(call) +
                            " has no memory for a batch's arrays: leave more of the device to "
                            "others (`reserve`), or make a smaller pool");
    }
    check(api, result, call, "cannot make a batch's arrays of " + to_string(asked));
  };
  MirrorBlock block{.size = size};
  const Bytes ring = size * MirrorBlock::kBuffers;
  require(api.cuMemAlloc(&block.device, size.value), "cuMemAlloc", size);
  void* pinned = nullptr;
  try {
    require(api.cuMemHostAlloc(&pinned, ring.value, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc",
            ring);
  } catch (...) {
    free(block);
    throw;
  }
  block.pinned = static_cast<std::byte*>(pinned);
  return block;
}

void MirrorMemory::free(const MirrorBlock& block) noexcept {
  const Driver& api = context_.api();
  if (block.pinned != nullptr) context_.report_unless(api.cuMemFreeHost(block.pinned));
  if (block.device != 0) context_.report_unless(api.cuMemFree(block.device));
}

}  // namespace kvspan::cuda
