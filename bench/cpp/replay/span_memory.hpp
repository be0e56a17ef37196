// The real cache, over a backend that keeps no memory and makes no calls but counts them as CUDA's
// does: one for each frame.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "null_backend.hpp"
#include "replay/memory.hpp"

namespace kvspan::bench {

struct SpanOptions {
  std::vector<LayerSpec> layers;
  std::int64_t max_seq_len = 0;
  std::int32_t max_seqs = 0;
  DeviceKind kind = DeviceKind::cuda;
  Bytes page_size, capacity;
  SizeClass largest;
  std::int32_t layers_per_page = 0;
  bool split_planes = false;
};

class SpanMemory final : public Memory {
 public:
  explicit SpanMemory(const SpanOptions& options);

  void begin(Id id, std::int64_t prompt) override;
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override;
  double bytes_per_token() const override;
  Held held() const override;
  void run_background(double from, double until) override;
  DriverWork work() const override;

 private:
  const DeviceKind kind_;
  NullBackend* backend_;
  std::shared_ptr<FrameStore> store_;
  std::shared_ptr<Cache> cache_;
  std::unordered_map<Id, std::shared_ptr<Sequence>> sequences_;
  std::vector<Id> batch_ids_;
  std::shared_ptr<Batch> batch_;
  double background_until_ = 0;  // the work it has begun is done
};

}  // namespace kvspan::bench
