// From scores to weights, all in base 2, with nothing scalar or across lanes but the maximum of a
// row: sums are rescaled only when that grows.
#pragma once

#include "kernel/scratch.hpp"
#include "kernel/tile.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

// Cap, bias and mask.
template <int kBlockRows>
KVSPAN_INLINE void adjust(const Problem& p, const Tile& tile, const Scratch& scratch, int block,
                          Floats slopes, bool is_masked, Floats* scores) {
  constexpr int kTokens = Block<kBlockRows>::kTokens;
  Ints token = static_cast<std::int32_t>(tile.begin) + lane_numbers() % kTokens;
  for (int i = 0; i < Block<kBlockRows>::kVectors; ++i, token += kTokens) {
    Floats x = scores[i];
    if (p.softcap > 0) x = tanh(x) * (p.softcap * kLog2E);
    if (p.alibi_slopes != nullptr) {
      const Floats distance = __builtin_convertvector(scratch.position[block] - token, Floats);
      x -= slopes * (Floats)((Ints)distance & 0x7fffffff);
    }
    if (is_masked) {
      const Ints is_seen = (token >= scratch.first[block]) & (token < scratch.last[block]);
      x = is_seen ? x : splat(kMinusInfinity);
    }
    scores[i] = x;
  }
}

template <class Product, int kBlockRows>
[[gnu::noinline]] static void weigh(const Problem& p, const Layout& layout, const Tile& tile,
                                    Scratch& scratch) {
  constexpr int kTokens = Block<kBlockRows>::kTokens;
  constexpr int kVectors = Block<kBlockRows>::kVectors;
  const bool is_masked = tile.begin < scratch.all_from || tile.begin + kTile > scratch.all_up_to;
  const bool is_adjusted = is_masked || p.softcap > 0 || p.alibi_slopes != nullptr;

  const int n_blocks = tile.item->n_heads * layout.n_blocks;
  for (int i = 0; i < n_blocks; ++i) {
    Floats* const scores = scratch.scores + i * kVectors;
    if (is_adjusted) {
      adjust<kBlockRows>(p, tile, scratch, i % layout.n_blocks, scratch.slopes[i], is_masked,
                         scores);
    }
    Floats largest = scores[0];
    KVSPAN_UNROLL for (int j = 1; j < kVectors; ++j) largest = max(largest, scores[j]);
    largest = max_of_group<kTokens>(largest);

    Floats weight = scratch.part.weight[i];
    const Floats before = scratch.part.largest[i];
    if (any(largest > before)) {
      const Floats now = max(largest, before);
      const Floats shrink = exp2(before - now);
      scratch.part.largest[i] = now;
      weight *= shrink;
      Floats* sums = scratch.part.sums + i * layout.sums_size() / kLanes;
      for (int chunk = 0; chunk < layout.n_chunks; ++chunk) {
        KVSPAN_UNROLL for (int row = 0; row < kBlockRows; ++row, sums += 2) {
          sums[0] *= shrink[row * kTokens];
          sums[1] *= shrink[row * kTokens];
        }
      }
    }
    const Floats top = scratch.part.largest[i];
    auto* const words = reinterpret_cast<std::uint32_t*>(scores);
    KVSPAN_UNROLL for (int j = 0; j < kVectors; ++j) {
      const Floats w = exp2(scores[j] - top);
      weight += w;
      Product::store_weights(words + j * kLanes / Product::kTokens, w);
    }
    scratch.part.weight[i] = weight;
  }
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
