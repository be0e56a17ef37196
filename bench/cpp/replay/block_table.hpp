// What the cache is compared with, where there is no driver to be called: blocks of a preallocated
// pool (vLLM's PagedAttention: of 16 tokens), or slots of the maximal length, which are blocks too.
#pragma once

#include <cmath>
#include <unordered_map>

#include "replay/memory.hpp"

namespace kvspan::bench {

class BlockTable final : public Memory {
 public:
  BlockTable(double capacity_bytes, double bytes_per_token, std::int64_t block_tokens)
      : bytes_per_token_(bytes_per_token),
        block_tokens_(block_tokens),
        n_free_(static_cast<std::int64_t>(capacity_bytes /
                                          (bytes_per_token * static_cast<double>(block_tokens)))) {}

  void begin(Id id, std::int64_t) override { lengths_[id] = 0; }
  bool extend(Id id, std::int64_t n) override;
  bool step(std::span<const Id> ids) override;
  void release(Id id) override;
  double available_bytes() const override { return bytes(n_free_ * block_tokens_); }
  double bytes_per_token() const override { return bytes_per_token_; }
  Held held() const override;
  void run_background(double, double) override {}
  DriverWork work() const override { return {}; }

 private:
  std::int64_t blocks_of(std::int64_t tokens) const {
    return (tokens + block_tokens_ - 1) / block_tokens_;
  }
  double bytes(std::int64_t tokens) const { return static_cast<double>(tokens) * bytes_per_token_; }

  const double bytes_per_token_;
  const std::int64_t block_tokens_;
  std::int64_t n_free_;
  std::int64_t n_used_blocks_ = 0, n_tokens_ = 0;
  std::unordered_map<Id, std::int64_t> lengths_;
};

}  // namespace kvspan::bench
