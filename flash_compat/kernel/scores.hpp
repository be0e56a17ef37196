// Queries times keys.
#pragma once

#include "kernel/scratch.hpp"
#include "kernel/tile.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

// What a stored key's scores are multiplied by: to logarithms of base 2, or, with a softcap, to
// fractions of the cap.
KVSPAN_INLINE float score_factor(const Problem& p, int kv_head) {
  const float scale =
      p.keys.scales != nullptr ? p.scale * p.keys.scales[kv_head * p.keys.scale_stride] : p.scale;
  return p.softcap > 0 ? scale / p.softcap : scale * kLog2E;
}

// kBlockRows rows of queries meet enough tokens at once that their sums fill half of the registers;
// a transposed reduction then leaves all of them in a few vectors. Tokens are the outer loop, for
// in memory a token's heads usually lie side by side.
template <class Product, int kBlockRows>
[[gnu::noinline]] static void score(const Problem& p, const Layout& layout, const Tile& tile,
                                    Prefetch& shared, Scratch& scratch) {
  constexpr int kVectors = kRegisters / 2 / kLanes;
  constexpr int kTokens = Block<kBlockRows>::kTokens;
  constexpr int kStep = kVectors * kTokens;
  static_assert(kTile % kStep == 0);
  using Query = typename Product::Chunk;

  Prefetch prefetch = shared;  // in registers
  const int n_heads = tile.item->n_heads;
  const int lines = prefetch.lines_per_step(kTile / kStep * n_heads);
  const std::ptrdiff_t last_chunk = (p.head_dim - 2 * kLanes) * Product::kBytes;
  for (int token = 0; token < kTile; token += kStep) {
    const Query* query = reinterpret_cast<const Query*>(scratch.queries);
    Floats* scores = scratch.scores + token / kTokens;
    for (int head = 0; head < n_heads; ++head) {
      prefetch.step(lines);
      const float factor = score_factor(p, tile.item->head_begin + head);
      for (int block = 0; block < layout.n_blocks; ++block) {
        Floats sums[kVectors][kLanes] = {};
        std::ptrdiff_t chunk = 0;
        for (int i = layout.n_chunks; i > 0; --i, query += kBlockRows) {
          if (i == 1) chunk = last_chunk;
          const std::ptrdiff_t offset = head * p.keys.head_stride + chunk;
          KVSPAN_UNROLL for (int j = 0; j < kStep; ++j) {
            const auto key = Product::key(tile.keys[token + j] + offset);
            Floats* of_token = sums[j / kTokens] + j % kTokens;
            KVSPAN_UNROLL for (int row = 0; row < kBlockRows; ++row) {
              of_token[row * kTokens] =
                  Product::add_scores(of_token[row * kTokens], query[row], key);
            }
          }
          chunk += 2 * kLanes * Product::kBytes;
        }
        KVSPAN_UNROLL for (int i = 0; i < kVectors; ++i) {
          scores[i] = transposed_sum(sums[i]) * factor;
        }
        scores += Block<kBlockRows>::kVectors;
      }
    }
  }
  shared = prefetch;
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
