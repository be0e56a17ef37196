// The real cache in virtual time: over a backend that keeps no memory and makes no calls but counts
// them as CUDA's does, one for each frame, or as a host's does.
//
// The background is played by the engine's thread. A piece of its work is done in no time; what it
// has mapped counts as there when the driver would be done, and a call that needs it before waits.
// So does a call that wants the cache's mutex while the background unmaps under it.
#pragma once

#include <vector>

#include "null_backend.hpp"
#include "replay/span_memory.hpp"

namespace kvspan::bench {

class ModelledSpan final : public SpanMemory {
 public:
  explicit ModelledSpan(const SpanOptions& options);

  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void run_background(double from, double until) override;
  DriverWork work() const override;
  double clock() const override { return work().seconds + waited_; }

 private:
  ModelledSpan(const SpanOptions& options, std::unique_ptr<NullBackend> backend);
  // The background is in the middle of these.
  void note_unfinished(TimePoint piece_began, const DriverWork& piece);
  void wait_if(bool is_held_up);

  const DeviceKind kind_;
  const NullBackend& backend_;
  double next_piece_ = 0;
  double busy_until_ = 0;
  std::vector<MapperEvent> unfinished_;
  bool is_unmapping_ = false;
  double now_ = 0;     // of the engine's calls
  double waited_ = 0;  // by them, for the background
};

}  // namespace kvspan::bench
