// Weights times values.
#pragma once

#include "kernel/scratch.hpp"
#include "kernel/tile.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

template <class Product, int kBlockRows>
[[gnu::noinline]] static void add_values(const Problem& p, const Layout& layout, const Tile& tile,
                                         Prefetch& shared, Scratch& scratch) {
  constexpr int kTokens = Block<kBlockRows>::kTokens;
  constexpr int kStep = 8;     // tokens that a chunk of sums takes in while it is in registers
  Prefetch prefetch = shared;  // in registers
  const int n_heads = tile.item->n_heads;
  const int lines =
      prefetch.lines_per_step(kTile / kStep * n_heads * layout.n_blocks * layout.n_chunks);
  const std::ptrdiff_t last_chunk = (p.head_dim - 2 * kLanes) * Product::kBytes;
  for (int token = 0; token < kTile; token += kStep) {
    const char* const* const rows = tile.values + token;
    Pair* sums = reinterpret_cast<Pair*>(scratch.part.sums);
    for (int i = 0; i < n_heads * layout.n_blocks; ++i) {
      const std::ptrdiff_t head = i / layout.n_blocks;
      const auto* const weights =
          reinterpret_cast<const std::uint32_t*>(scratch.scores + i * Block<kBlockRows>::kVectors) +
          token * kBlockRows / Product::kTokens;
      std::ptrdiff_t chunk = 0;
      for (int left = layout.n_chunks; left > 0; --left, sums += kBlockRows) {
        prefetch.step(lines);
        if (left == 1) chunk = last_chunk;
        const std::ptrdiff_t offset = head * p.values.head_stride + chunk;
        Pair sum[kBlockRows];
        KVSPAN_UNROLL for (int row = 0; row < kBlockRows; ++row) sum[row] = sums[row];
        KVSPAN_UNROLL for (int j = 0; j < kStep; j += Product::kTokens) {
          const Pair values = Product::values(rows + j, offset);
          KVSPAN_UNROLL for (int row = 0; row < kBlockRows; ++row) {
            const int lane = j / kTokens * kLanes + row * kTokens + j % kTokens;
            const auto weight = Product::weight(weights + lane / Product::kTokens);
            sum[row] = Product::add_values(sum[row], weight, values);
          }
        }
        KVSPAN_UNROLL for (int row = 0; row < kBlockRows; ++row) sums[row] = sum[row];
        chunk += 2 * kLanes * Product::kBytes;
      }
    }
  }
  shared = prefetch;
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
