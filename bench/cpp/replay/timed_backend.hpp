// Another backend, whose driver calls are timed, and told apart by who made them: the thread that
// made this backend, which is the engine's, or another, which is the background. Where a driver is
// only pretended, a call can be made to last as long as a real one: the thread is busy that long.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <thread>

#include "backend/backend.hpp"
#include "replay/memory.hpp"

namespace kvspan::bench {

class TimedBackend final : public Backend {
 public:
  // With `times`, calls last at least that.
  TimedBackend(std::unique_ptr<Backend> inner, std::optional<DriverTimes> times)
      : inner_(std::move(inner)), times_(times) {}

  // Of the engine's thread, or of all others.
  DriverWork work_of_engine() const { return work(engine_); }
  DriverWork work_of_others() const { return work(others_); }

  const Traits& traits() const noexcept override { return inner_->traits(); }
  MemoryInfo memory_info() const override { return inner_->memory_info(); }
  HugePages huge_pages() const override { return inner_->huge_pages(); }
  bool usable() const noexcept override { return inner_->usable(); }
  bool is_passed(Fence fence) const noexcept override { return inner_->is_passed(fence); }
  Stream own_stream() const noexcept override { return inner_->own_stream(); }
  void finish() noexcept override { inner_->finish(); }
  std::unique_ptr<Mirror> make_mirror(Bytes size) override { return inner_->make_mirror(size); }

 private:
  using Clock = std::chrono::steady_clock;

  // Relaxed: figures, read while others count on.
  struct Tally {
    std::array<std::atomic<std::uint64_t>, DriverWork::kNames> calls{};
    std::atomic<std::uint64_t> ns{0}, pages{0};
  };

  static DriverWork work(const Tally& tally) {
    DriverWork work;
    for (std::size_t i = 0; i < DriverWork::kNames; ++i) work.calls[i] = tally.calls[i];
    work.seconds = 1e-9 * static_cast<double>(tally.ns);
    work.pages_mapped = static_cast<double>(tally.pages);
    return work;
  }

  Tally& mine() { return std::this_thread::get_id() == engine_thread_ ? engine_ : others_; }

  // f(), which is about `n` handles and lasts `us` for each.
  template <class F>
  void timed(DriverWork::Name name, std::uint64_t n, double us, F f) {
    const auto begin = Clock::now();
    f();
    auto now = Clock::now();
    if (times_) {
      const auto lasts = std::chrono::duration<double, std::micro>(us * static_cast<double>(n));
      while (now - begin < lasts) now = Clock::now();
    }
    Tally& tally = mine();
    const bool is_split = traits().calls_per_frame && name != DriverWork::unmap;
    tally.calls[name].fetch_add(is_split ? n : 1, std::memory_order_relaxed);
    tally.ns.fetch_add(static_cast<std::uint64_t>((now - begin).count()),
                       std::memory_order_relaxed);
  }
  DriverTimes times() const { return times_.value_or(DriverTimes{}); }

  VirtualRange do_reserve(Bytes size, Unmapped unmapped) override {
    return inner_->reserve(size, unmapped);
  }
  void do_free(VirtualRange range) noexcept override { inner_->free(range); }
  void do_create(FrameRun run) override {
    timed(DriverWork::create, run.count, times().create, [&] { inner_->create(run); });
  }
  void do_release(FrameRun run) noexcept override {
    timed(DriverWork::release, run.count, times().release, [&] { inner_->release(run); });
  }
  ExportedFrame do_export_frame(FrameId frame) override { return inner_->export_frame(frame); }
  void do_import_frame(FrameId frame, const ExportedFrame& exported) override {
    inner_->import_frame(frame, exported);
  }
  void do_map(Address at, FrameRun run, Access access) override {
    // Granting access is part of it; on a GPU that is a call of its own.
    timed(DriverWork::map, run.count, times().map + times().set_access,
          [&] { inner_->map(at, run, access); });
    if (traits().calls_per_frame) ++mine().calls[DriverWork::set_access];
    mine().pages.fetch_add(run.pages().value, std::memory_order_relaxed);
  }
  void do_set_access(VirtualRange range, Access access) override {
    inner_->set_access(range, access);
  }
  void do_unmap(VirtualRange range, std::uint32_t handles) override {
    timed(DriverWork::unmap, handles, times().unmap, [&] { inner_->unmap(range, handles); });
  }
  void do_copy(Address to, Address from, Bytes size, Stream stream) override {
    inner_->copy(to, from, size, stream);
  }
  void do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) override {
    inner_->fill(at, value, size, stream);
  }
  Fence do_record_fence(Stream stream) override { return inner_->record_fence(stream); }
  void do_wait(Fence fence) override { inner_->wait(fence); }
  void do_order_after(Stream stream, Fence fence) override { inner_->order_after(stream, fence); }
  std::uint64_t failures_elsewhere() const noexcept override { return inner_->failure_count(); }

  const std::unique_ptr<Backend> inner_;
  const std::optional<DriverTimes> times_;
  const std::thread::id engine_thread_ = std::this_thread::get_id();
  Tally engine_, others_;
};

}  // namespace kvspan::bench
