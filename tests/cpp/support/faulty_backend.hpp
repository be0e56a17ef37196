// A backend for fault injection: it forwards to a real one, fails the calls that a test chooses,
// lets the test decide when fences are passed, and holds every call against the strictest reading
// of the contract (mapping_model.hpp).
//
//   FaultyBackend& faulty = ...;            // owned by the store under test
//   faulty.fail(3, Fault::out_of_memory);   // the third call from now that can throw
//   ...
//   BOOST_TEST(faulty.fired());
//   BOOST_TEST(faulty.violations().empty());
//
// A call that fails is not forwarded: it changes nothing. `free` and `release` cannot throw; they
// fail only when asked for by name, and then report and leak, as a backend does.
// Threads: everything may be called from any thread.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "support/mapping_model.hpp"

namespace kvspan::test {

enum class Fault : std::uint8_t { out_of_memory, capacity, driver };

class FaultyBackend final : public Backend {
 public:
  static constexpr std::uint64_t kEver = std::numeric_limits<std::uint64_t>::max();

  explicit FaultyBackend(std::unique_ptr<Backend> real)
      : real_(std::move(real)), traits_(real_->traits()), model_(traits_.page_size) {}

  // ---- faults ----

  // Fails the n-th call from now (1 is the next) that can throw, or of that name; and then as many
  // as follow, `times` in all.
  void fail(std::uint64_t n, Fault fault, std::optional<Call> only = {}, std::uint64_t times = 1) {
    std::scoped_lock lock(mutex_);
    plan_ = Plan{n, times, fault, only};
    fired_ = 0;
  }
  void fail_no_more() {
    std::scoped_lock lock(mutex_);
    plan_.reset();
  }
  // Whether a call has failed since `fail`: a loop over n ends when one has not.
  bool fired() const { return failed_calls() > 0; }
  std::uint64_t failed_calls() const {
    std::scoped_lock lock(mutex_);
    return fired_;
  }

  // ---- fences ----

  // From now on fences are passed when the test, or a wait, passes them.
  void set_manual_fences(bool manual) {
    std::scoped_lock lock(mutex_);
    manual_ = manual;
  }
  void pass(Fence fence) {
    std::scoped_lock lock(mutex_);
    const auto it = fences_.find(fence.id);
    if (it == fences_.end()) model_.violation("pass: no such fence");
    if (it != fences_.end()) it->second.is_passed = true;
  }
  void pass_all() {
    std::scoped_lock lock(mutex_);
    for (auto& [id, fence] : fences_) fence.is_passed = true;
  }
  std::vector<Fence> unpassed() const {
    std::scoped_lock lock(mutex_);
    std::vector<Fence> fences;
    for (const auto& [id, fence] : fences_) {
      if (!fence.is_passed) fences.push_back({id});
    }
    return fences;
  }
  // The fences that were not yet passed when somebody waited for them, in that order.
  std::vector<Fence> waited_for() const {
    std::scoped_lock lock(mutex_);
    return waited_for_;
  }

  // From now on nothing reads as zeros where nothing is mapped, and new frames neither, as on a
  // GPU.
  void have_no_zeros() { traits_.zero_on_unmapped = traits_.creates_zeros = false; }

  // ---- what was seen ----

  // What CUDA would have refused, in words.
  std::vector<std::string> violations() const {
    std::scoped_lock lock(mutex_);
    return model_.violations();
  }
  struct Live {
    std::size_t reservations, frames, mappings;
    bool operator==(const Live&) const = default;
  };
  Live live() const {
    std::scoped_lock lock(mutex_);
    return {model_.reservations(), model_.frames(), model_.mappings()};
  }
  Backend& real() { return *real_; }

  // ---- the contract ----

  const Traits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() const override { return real_->memory_info(); }
  HugePages huge_pages() const override { return real_->huge_pages(); }
  bool usable() const noexcept override { return real_->usable(); }
  void finish() noexcept override { real_->finish(); }
  std::unique_ptr<Mirror> make_mirror(Bytes size) override { return real_->make_mirror(size); }
  Stream own_stream() const noexcept override { return real_->own_stream(); }
  bool is_passed(Fence fence) const noexcept override {
    std::scoped_lock lock(mutex_);
    const auto it = fences_.find(fence.id);
    return it == fences_.end() || (it->second.is_passed && real_->is_passed(it->second.real));
  }

 private:
  struct Plan {
    std::uint64_t countdown;
    std::uint64_t times;
    Fault fault;
    std::optional<Call> only;
  };
  struct KnownFence {
    Fence real;
    bool is_passed;
  };
  using Lock = std::scoped_lock<std::mutex>;

  VirtualRange do_reserve(Bytes size, Unmapped unmapped) override {
    before(Call::reserve, size, [&] {
      model_.check_reserve(size);
      if (unmapped == Unmapped::zero && !traits_.zero_on_unmapped) {
        model_.violation("reserve: this device has no zeros");
      }
    });
    const VirtualRange range = real_->reserve(size, unmapped);
    Lock lock(mutex_);
    model_.did_reserve(range);
    return range;
  }
  void do_free(VirtualRange range) noexcept override {
    if (!may_go_on(Call::free, [&] { model_.check_free(range); })) return;
    {
      Lock lock(mutex_);  // before: another thread may be given the range at once
      model_.did_free(range);
    }
    forward([&] { real_->free(range); });
  }
  void do_create(FrameRun run) override {
    before(Call::create, size_of_run(run), [&] { model_.check_create(run); });
    real_->create(run);
    Lock lock(mutex_);
    model_.did_create(run);
  }
  void do_release(FrameRun run) noexcept override {
    if (!may_go_on(Call::release, [&] { model_.check_release(run); })) return;
    forward([&] { real_->release(run); });
    Lock lock(mutex_);
    model_.did_release(run);
  }
  ExportedFrame do_export_frame(FrameId frame) override {
    before(Call::export_frame, Bytes(0), [&] { model_.check_export(frame); });
    return real_->export_frame(frame);
  }
  void do_import_frame(FrameId frame, const ExportedFrame& exported) override {
    const FrameRun run{frame, 1};
    before(Call::import_frame, size_of_run(run), [&] { model_.check_create(run); });
    real_->import_frame(frame, exported);
    Lock lock(mutex_);
    model_.did_create(run);
  }
  void do_map(Address at, FrameRun run, Access access) override {
    before(Call::map, size_of_run(run), [&] { model_.check_map(at, run); });
    real_->map(at, run, access);
    Lock lock(mutex_);
    model_.did_map(at, run, access);
  }
  void do_set_access(VirtualRange range, Access access) override {
    before(Call::set_access, range.size, [&] { model_.check_set_access(range); });
    real_->set_access(range, access);
    Lock lock(mutex_);
    model_.did_set_access(range, access);
  }
  void do_unmap(VirtualRange range, std::uint32_t handles) override {
    before(Call::unmap, range.size, [&] { model_.check_unmap(range, handles); });
    real_->unmap(range, handles);
    Lock lock(mutex_);
    model_.did_unmap(range);
  }
  void do_copy(Address to, Address from, Bytes size, Stream stream) override {
    before(Call::copy, size, [&] {
      model_.check_read("copy", from, size);
      model_.check_write("copy", to, size);
      model_.check_apart(to, from, size);
    });
    real_->copy(to, from, size, stream);
  }
  void do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) override {
    before(Call::fill, size, [&] { model_.check_write("fill", at, size); });
    real_->fill(at, value, size, stream);
  }
  Fence do_record_fence(Stream stream) override {
    before(Call::record_fence, Bytes(0), [] {});
    const Fence real = real_->record_fence(stream);
    Lock lock(mutex_);
    const Fence fence{++last_fence_};
    fences_[fence.id] = {real, !manual_};
    return fence;
  }
  void do_wait(Fence fence) override {
    before(Call::wait_fence, Bytes(0), [&] {
      if (fence.id != 0 && !fences_.contains(fence.id)) model_.violation("wait: no such fence");
    });
    Fence real;
    {
      Lock lock(mutex_);
      const auto it = fences_.find(fence.id);
      if (it == fences_.end()) return;
      real = it->second.real;
      if (!it->second.is_passed) waited_for_.push_back(fence);
    }
    real_->wait(real);
    Lock lock(mutex_);
    fences_[fence.id].is_passed = true;
  }

  void do_order_after(Stream stream, Fence fence) override {
    before(Call::order_after, Bytes(0), [&] {
      if (fence.id != 0 && !fences_.contains(fence.id)) model_.violation("order: no such fence");
    });
    Fence real;
    {
      Lock lock(mutex_);
      if (const auto it = fences_.find(fence.id); it != fences_.end()) real = it->second.real;
    }
    real_->order_after(stream, real);
  }

  Bytes size_of_run(FrameRun run) const { return size_of(run.pages(), traits().page_size); }

  // Whether the plan has this call fail. Under the lock.
  std::optional<Fault> due(Call call) {
    if (!plan_ || (plan_->only ? *plan_->only != call : cannot_throw(call))) return {};
    if (plan_->countdown > 1) {
      --plan_->countdown;
      return {};
    }
    const Fault fault = plan_->fault;
    ++fired_;
    if (plan_->times != kEver && --plan_->times == 0) plan_.reset();
    return fault;
  }
  static bool cannot_throw(Call call) { return call == Call::free || call == Call::release; }

  // The check comes first: a call that must not be made is wrong also where it fails.
  template <class Check>
  void before(Call call, Bytes size, Check check) {
    Lock lock(mutex_);
    check();
    const auto fault = due(call);
    if (!fault) return;
    const std::string name(kCallNames[static_cast<std::size_t>(call)]);
    switch (*fault) {
      case Fault::out_of_memory:
        throw OutOfMemory(size, Bytes(0), Bytes(0), name + ": injected");
      case Fault::capacity:
        throw CapacityError(name + ": injected");
      case Fault::driver:
        throw DriverError(name, "EINJECTED", "injected");
    }
  }
  template <class Check>
  bool may_go_on(Call call, Check check) noexcept {
    Lock lock(mutex_);
    check();
    if (!due(call)) return true;
    report_failure();
    return false;
  }
  template <class F>
  void forward(F f) noexcept {
    const std::uint64_t failures = real_->failure_count();
    f();
    if (real_->failure_count() != failures) report_failure();
  }

  const std::unique_ptr<Backend> real_;
  Traits traits_;
  mutable std::mutex mutex_;  // guards what follows; never held while the real backend works
  MappingModel model_;
  std::optional<Plan> plan_;
  std::uint64_t fired_ = 0;
  bool manual_ = false;
  std::uint64_t last_fence_ = 0;
  std::map<std::uint64_t, KnownFence> fences_;
  std::vector<Fence> waited_for_;
};

}  // namespace kvspan::test
