// The real cache, over any backend. How time passes for it, and who plays its background, is told
// by what is derived from it: modelled_span.hpp, paced_span.hpp.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "cache/sequence.hpp"
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

class SpanMemory : public Memory {
 public:
  void begin(Id id, std::int64_t prompt) override;
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override;
  double bytes_per_token() const override;
  Held held() const override;

 protected:
  // `shrink`: how many times smaller everything is than what the engine sees.
  SpanMemory(const SpanOptions& options, std::unique_ptr<Backend> backend, Stream stream = {},
             double shrink = 1);

  FrameStore& store() const { return *store_; }
  const Cache& cache() const { return *cache_; }
  const SequenceState& state(Id id) const { return *sequences_.at(id)->state(); }

 private:
  const Stream stream_;
  const double shrink_;
  const std::shared_ptr<FrameStore> store_;
  std::shared_ptr<Cache> cache_;
  std::unordered_map<Id, std::shared_ptr<Sequence>> sequences_;
  std::vector<Id> batch_ids_;
  std::shared_ptr<Batch> batch_;
};

}  // namespace kvspan::bench
