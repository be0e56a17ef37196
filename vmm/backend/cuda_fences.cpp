#include "backend/cuda_fences.hpp"

#include <algorithm>

#include "backend/cuda_capture.hpp"

namespace kvspan::cuda {

namespace {

// How many fences a recording looks at: more than it adds, so that they cannot pile up behind work
// that has been done.
constexpr std::size_t kReapPerRecord = 4;

}  // namespace

Fences::~Fences() {
  const Current current(context_, std::nothrow);
  for (const Recorded& r : recorded_) context_.report_unless(api_.cuEventDestroy(r.event));
  for (const CUevent event : idle_) context_.report_unless(api_.cuEventDestroy(event));
}

CUevent Fences::idle_event() {
  if (!idle_.empty()) {
    const CUevent event = idle_.back();
    idle_.pop_back();
    return event;
  }
  CUevent event = nullptr;
  check(api_, api_.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate",
        "cannot make a fence");
  return event;
}

Fence Fences::record(CUstream stream) {
  require_no_capture(api_, stream);
  const std::scoped_lock lock(mutex_);
  reap();
  idle_.reserve(idle_.size() + recorded_.size() + 1);  // giving events back cannot fail
  Recorded& recorded = recorded_.emplace_back();
  try {
    recorded.event = idle_event();
  } catch (...) {
    recorded_.pop_back();
    throw;
  }
  if (const CUresult result = api_.cuEventRecord(recorded.event, stream); result != CUDA_SUCCESS) {
    idle_.push_back(recorded.event);
    recorded_.pop_back();
    throw_error(api_, "cuEventRecord", result, "cannot record a fence on the stream");
  }
  recorded.id = ++last_id_;
  return {last_id_};
}

Fences::Recorded* Fences::find(std::uint64_t id) noexcept {
  const auto it = std::ranges::lower_bound(recorded_, id, {}, &Recorded::id);
  return it != recorded_.end() && it->id == id ? &*it : nullptr;
}

void Fences::reap() noexcept {
  // Round and round, so that fences of a stream that is slow do not hide those of the others.
  for (std::size_t i = 0; i < kReapPerRecord && !recorded_.empty(); ++i) {
    if (reap_at_ >= recorded_.size()) reap_at_ = 0;
    const auto it = recorded_.begin() + static_cast<std::ptrdiff_t>(reap_at_);
    if (it->n_waiting == 0 && api_.cuEventQuery(it->event) == CUDA_SUCCESS) {
      idle_.push_back(it->event);
      recorded_.erase(it);
    } else {
      ++reap_at_;
    }
  }
}

bool Fences::is_passed(Fence fence) noexcept {
  const std::scoped_lock lock(mutex_);
  Recorded* const recorded = find(fence.id);
  if (recorded == nullptr) return true;
  const CUresult result = api_.cuEventQuery(recorded->event);
  if (result != CUDA_ERROR_NOT_READY) context_.report_unless(result);
  return result == CUDA_SUCCESS;
}

void Fences::wait(Fence fence) {
  CUevent event = nullptr;
  {
    const std::scoped_lock lock(mutex_);
    Recorded* const recorded = find(fence.id);
    if (recorded == nullptr) return;
    event = recorded->event;
    ++recorded->n_waiting;
  }
  // Without the lock: others record and ask meanwhile.
  const CUresult result = api_.cuEventSynchronize(event);
  {
    const std::scoped_lock lock(mutex_);
    if (Recorded* const recorded = find(fence.id)) --recorded->n_waiting;
  }
  check(api_, result, "cuEventSynchronize", "the work that was waited for failed");
}

void Fences::order_after(CUstream stream, Fence fence) {
  const std::scoped_lock lock(mutex_);
  Recorded* const recorded = find(fence.id);
  if (recorded == nullptr) return;
  require_no_capture(api_, stream);
  check(api_, api_.cuStreamWaitEvent(stream, recorded->event, 0), "cuStreamWaitEvent",
        "cannot order the stream after a fence");
}

}  // namespace kvspan::cuda
