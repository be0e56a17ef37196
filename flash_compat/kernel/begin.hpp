// An item's beginning: its queries brought into the product's form, its sums empty, and which
// tokens each query row sees.
#pragma once

#include "kernel/scratch.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

// A score that all others exceed; minus infinity would leave a row without keys as NaN.
constexpr float kLowest = -1e30f;

// One row's chunk, in order; in the last chunk without what the one before it has.
KVSPAN_INLINE Pair query_chunk(const Problem& p, const Layout& layout, const char* row, int chunk) {
  constexpr int kChunk = 2 * kLanes;
  const bool is_last = chunk + 1 == layout.n_chunks;
  const int from = is_last ? p.head_dim - kChunk : chunk * kChunk;
  Pair x = load_chunk(p.query_element, row + from * size_of(p.query_element));
  const int overlap = chunk * kChunk - from;
  x.a = lane_numbers() < overlap ? Floats{} : x.a;
  x.b = lane_numbers() + kLanes < overlap ? Floats{} : x.b;
  return x;
}

template <class Product, int kBlockRows>
static void begin(const Piece& piece, const Item& item, Scratch& scratch) {
  const Problem& p = *piece.problem;
  const Layout& layout = *piece.layout;
  using Query = typename Product::Chunk;
  const int group = p.group(), n_rows = p.query_rows();
  auto* query = reinterpret_cast<Query*>(scratch.queries);
  for (int head = 0; head < item.n_heads; ++head) {
    for (int block = 0; block < layout.n_blocks; ++block) {
      for (int chunk = 0; chunk < layout.n_chunks; ++chunk) {
        for (int i = 0; i < kBlockRows; ++i) {
          const int row = block * kBlockRows + i;
          if (row >= n_rows) {
            *query++ = Query{};
            continue;
          }
          const std::ptrdiff_t q_head = (item.head_begin + head) * group + row % group;
          *query++ = Product::query(query_chunk(p, layout,
                                                p.queries.data + item.row * p.queries.batch_stride +
                                                    row / group * p.queries.position_stride +
                                                    q_head * p.queries.head_stride,
                                                chunk));
        }
      }
    }
  }

  scratch.part = Part(layout, item.first_tile < piece.begin ? piece.leading : piece.own);
  const int n_blocks = item.n_heads * layout.n_blocks;
  for (std::ptrdiff_t i = 0; i < n_blocks * layout.sums_size() / kLanes; ++i) {
    scratch.part.sums[i] = Floats{};
  }
  for (int i = 0; i < n_blocks; ++i) {
    scratch.part.largest[i] = splat(kLowest);
    scratch.part.weight[i] = Floats{};
  }

  const int length = p.lengths[item.row];
  const auto position = [&](int row) { return length - p.query_length + row / group; };
  const auto first = [&](int row) { return p.window_left < 0 ? 0 : position(row) - p.window_left; };
  const auto last = [&](int row) {
    const int beyond = length - position(row);
    return p.window_right < 0 || p.window_right >= beyond ? length
                                                          : position(row) + p.window_right + 1;
  };
  for (int block = 0; block < layout.n_blocks; ++block) {
    using B = Block<kBlockRows>;
    const auto of = [&](auto what) {
      return B::template by_row<Ints>([&](int i) { return what(block * kBlockRows + i); });
    };
    scratch.position[block] = of(position);
    scratch.first[block] = of(first);
    scratch.last[block] = of(last);
  }
  scratch.all_from = first(n_rows - 1);
  scratch.all_up_to = last(0);

  if (p.alibi_slopes == nullptr) return;
  for (int i = 0; i < n_blocks; ++i) {
    const float* slopes = p.alibi_slopes + item.row * p.alibi_stride +
                          (item.head_begin + i / layout.n_blocks) * group;
    const int row = i % layout.n_blocks * kBlockRows;
    scratch.slopes[i] = Block<kBlockRows>::template by_row<Floats>(
        [&](int j) { return slopes[(row + j) % group] * kLog2E; });
  }
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
