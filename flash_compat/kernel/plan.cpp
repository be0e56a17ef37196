#include "kernel/plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kvspan::flash {

namespace {

// An item's tile of keys and values and the one behind it, and its sums, are to stay in a core's
// second-level cache.
constexpr std::ptrdiff_t kMaxRowBytes = 8 << 10;
constexpr std::ptrdiff_t kMaxSumsBytes = 128 << 10;
// What is read faster than another thread is woken.
constexpr std::ptrdiff_t kLeastPieceBytes = 64 << 10;

[[noreturn]] void refuse(const std::string& what, int row, std::int64_t value, std::int64_t limit) {
  throw std::invalid_argument(what + " of row " + std::to_string(row) + " is " +
                              std::to_string(value) + "; there are " + std::to_string(limit));
}

void check_places(const Problem& p) {
  for (int row = 0; row < p.batch; ++row) {
    const int length = p.lengths[row];
    if (length > p.n_positions) refuse("the length", row, length, p.n_positions);
    if (length <= 0) continue;
    if (p.block_table != nullptr) {
      const std::int32_t* blocks = p.block_table + row * p.block_table_stride;
      for (int i = 0; i <= (length - 1) / p.block_size; ++i) {
        if (blocks[i] < 0 || blocks[i] >= p.n_slots) refuse("a block", row, blocks[i], p.n_slots);
      }
    } else {
      const int slot = p.slots != nullptr ? p.slots[row] : row;
      if (slot < 0 || slot >= p.n_slots) refuse("the slot", row, slot, p.n_slots);
    }
  }
}

// Neighbouring heads are read together when they lie side by side, for long runs of memory stream
// best; each by itself when a head's tokens are what lies together.
int heads_together(const Problem& p, const Layout& layout) {
  const auto apart = [&](const Plane& plane) {
    return plane.head_stride >= plane.position_stride && p.n_positions > 1;
  };
  if (apart(p.keys) || apart(p.values)) return 1;
  const std::ptrdiff_t row_bytes = std::ptrdiff_t{p.head_dim} * size_of(p.key_element);
  const std::ptrdiff_t sums_bytes = layout.n_blocks * layout.sums_size() * 4;
  const auto most = std::clamp<std::ptrdiff_t>(
      std::min(kMaxRowBytes / row_bytes, kMaxSumsBytes / sums_bytes), 1, p.n_kv_heads);
  const auto n_groups = (p.n_kv_heads + most - 1) / most;
  return static_cast<int>((p.n_kv_heads + n_groups - 1) / n_groups);
}

Layout layout_of(const Problem& p, int lanes) {
  const int rows = p.query_rows(), chunk = 2 * lanes;
  const int block_rows = rows >= 3 ? 4 : rows;
  Layout layout{.lanes = lanes,
                .block_rows = block_rows,
                .n_blocks = (rows + block_rows - 1) / block_rows,
                .n_chunks = (p.head_dim + chunk - 1) / chunk,
                .max_heads = 0};
  layout.max_heads = heads_together(p, layout);
  return layout;
}

}  // namespace

int Plan::piece_of(std::int64_t tile) const {
  return static_cast<int>(std::upper_bound(cuts.begin(), cuts.end(), tile) - cuts.begin()) - 1;
}

int Plan::item_of(std::int64_t tile) const {
  const auto after =
      std::upper_bound(items.begin(), items.end(), tile,
                       [](std::int64_t t, const Item& item) { return t < item.last_tile(); });
  return static_cast<int>(after - items.begin());
}

Plan make_plan(const Problem& p, int lanes, int n_threads) {
  check_places(p);
  Plan plan{.layout = layout_of(p, lanes), .items = {}, .cuts = {}, .unfinished = {}};
  std::int64_t n_tiles = 0;
  for (int row = 0; row < p.batch; ++row) {
    const std::int64_t length = std::max(p.lengths[row], 0);
    const std::int64_t first_query = length - p.query_length;
    // The last query stands at the last key, and sees it.
    std::int64_t begin = p.begins != nullptr ? p.begins[row] : 0;
    if (p.window_left >= 0) begin = std::max(begin, first_query - p.window_left);
    begin = std::clamp<std::int64_t>(begin, 0, length);
    for (int head = 0; head < p.n_kv_heads; head += plan.layout.max_heads) {
      const int n_heads = std::min(plan.layout.max_heads, p.n_kv_heads - head);
      plan.items.push_back({row, head, n_heads, begin, length, n_tiles});
      n_tiles += plan.items.back().n_tiles();
    }
  }

  const std::ptrdiff_t tile_bytes =
      std::ptrdiff_t{2} * kTile * plan.layout.max_heads * p.head_dim * size_of(p.key_element);
  const std::int64_t n_pieces = std::clamp<std::int64_t>(
      std::min(n_tiles, n_tiles * tile_bytes / kLeastPieceBytes), 1, std::max(n_threads, 1));
  for (std::int64_t i = 0; i <= n_pieces; ++i) plan.cuts.push_back(n_tiles * i / n_pieces);

  for (int i = 0; i < static_cast<int>(plan.items.size()); ++i) {
    const Item& item = plan.items[static_cast<std::size_t>(i)];
    const bool is_whole =
        item.n_tiles() > 0 && plan.piece_of(item.first_tile) == plan.piece_of(item.last_tile() - 1);
    if (!is_whole) plan.unfinished.push_back(i);
  }
  return plan;
}

}  // namespace kvspan::flash
