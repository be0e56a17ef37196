// A backend whose frames and mappings are nowhere: what remains is the bookkeeping above it.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.hpp"
#include "core/sizes.hpp"

namespace kvspan::bench {

class NullMirror final : public Mirror {
 public:
  explicit NullMirror(Bytes size) : bytes_(size.value) {}
  void* host() noexcept override { return bytes_.data(); }
  Address device() const noexcept override {
    return Address(reinterpret_cast<std::uintptr_t>(bytes_.data()));
  }
  void publish(Stream) override {}

 private:
  std::vector<std::byte> bytes_;
};

class NullBackend final : public Backend {
 public:
  NullBackend() = default;
  // As a GPU's: with a call for each frame. As a host's: with one for each run of frames.
  NullBackend(DeviceKind kind, Bytes page_size) {
    traits_.kind = kind;
    traits_.page_size = page_size;
    traits_.calls_per_frame = kind == DeviceKind::cuda;
  }

  // Of all frames that were mapped so far.
  std::uint64_t pages_mapped() const noexcept { return pages_mapped_; }

  const Traits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() const override { return {}; }
  HugePages huge_pages() const override { return {}; }
  bool usable() const noexcept override { return true; }
  bool is_passed(Fence) const noexcept override { return true; }
  void finish() noexcept override {}
  std::unique_ptr<Mirror> make_mirror(Bytes size) override {
    return std::make_unique<NullMirror>(size);
  }

 private:
  VirtualRange do_reserve(Bytes size, Unmapped) override {
    return {Address(traits_.page_size.value), size};
  }
  void do_free(VirtualRange) noexcept override {}
  void do_create(FrameRun) override {}
  void do_release(FrameRun) noexcept override {}
  ExportedFrame do_export_frame(FrameId) override { return {}; }
  void do_import_frame(FrameId, const ExportedFrame&) override {}
  void do_map(Address, FrameRun run, Access) override { pages_mapped_ += run.pages().value; }
  void do_set_access(VirtualRange, Access) override {}
  void do_unmap(VirtualRange, std::uint32_t) override {}
  void do_copy(Address, Address, Bytes, Stream) override {}
  void do_fill(Address, std::uint8_t, Bytes, Stream) override {}
  Fence do_record_fence(Stream) override { return {}; }
  void do_wait(Fence) override {}
  void do_order_after(Stream, Fence) override {}

  Traits traits_{.device = "null",
                 .kind = DeviceKind::cpu,
                 .ordinal = 0,
                 .page_size = kMiB * 2,
                 .preferred_class = SizeClass(0),
                 .zero_on_unmapped = true};
  std::uint64_t pages_mapped_ = 0;
};

}  // namespace kvspan::bench
