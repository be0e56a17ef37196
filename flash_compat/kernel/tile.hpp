// A piece's tiles, one after the other, as addresses of rows, and the prefetching of what comes
// next. That a row is found through an address, wherever that came from, makes contiguous slots,
// any stride and block tables one case.
#pragma once

#include "kernel/simd.hpp"
#include "kernel/work.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

struct Tile {
  const Item* item;
  std::int64_t index;  // in the line
  std::int64_t begin;  // token
  // Of the item's first head. Behind the item's last token that token's row stands again: nothing
  // beyond a length is ever read, and what is masked needs to be no more than readable.
  const char* keys[kTile];
  const char* values[kTile];
};

class Tiles {
 public:
  [[gnu::always_inline]] explicit Tiles(const Piece& piece)
      : piece_(piece), item_(piece.items + piece.first_item), index_(piece.begin) {}

  // Whether there was one.
  [[gnu::always_inline]] bool next(Tile& tile) {
    if (index_ == piece_.end) return false;
    while (index_ >= item_->last_tile()) ++item_;
    tile.item = item_;
    tile.index = index_;
    tile.begin = item_->begin + (index_ - item_->first_tile) * kTile;
    const std::int64_t left = item_->end - tile.begin;
    const int n = left < kTile ? static_cast<int>(left) : kTile;
    if (piece_.problem->block_table != nullptr) {
      through_table(tile, n);
    } else {
      in_slot(piece_.problem->keys, tile, tile.keys, n);
      in_slot(piece_.problem->values, tile, tile.values, n);
    }
    for (int i = n; i < kTile; ++i) {
      tile.keys[i] = tile.keys[n - 1];
      tile.values[i] = tile.values[n - 1];
    }
    ++index_;
    return true;
  }

 private:
  [[gnu::always_inline]] void in_slot(const Plane& plane, const Tile& tile, const char** rows,
                                      int n) const {
    const std::int32_t* slots = piece_.problem->slots;
    const std::ptrdiff_t slot = slots != nullptr ? slots[item_->row] : item_->row;
    const char* at = plane.data + slot * plane.slot_stride + tile.begin * plane.position_stride +
                     item_->head_begin * plane.head_stride;
    for (int i = 0; i < n; ++i, at += plane.position_stride) rows[i] = at;
  }

  [[gnu::always_inline]] void through_table(Tile& tile, int n) const {
    const Problem& p = *piece_.problem;
    const std::int32_t* block =
        p.block_table + item_->row * p.block_table_stride + tile.begin / p.block_size;
    std::int64_t position = tile.begin % p.block_size;
    for (int i = 0; i < n; ++i) {
      tile.keys[i] = row(p.keys, *block, position);
      tile.values[i] = row(p.values, *block, position);
      if (++position == p.block_size) {
        position = 0;
        ++block;
      }
    }
  }

  [[gnu::always_inline]] const char* row(const Plane& plane, std::ptrdiff_t block,
                                         std::int64_t position) const {
    return plane.data + block * plane.slot_stride + position * plane.position_stride +
           item_->head_begin * plane.head_stride;
  }

  const Piece& piece_;
  const Item* item_;
  std::int64_t index_;
};

// Asks for every cache line of a tile's rows, in the order of their addresses, a few at a time
// between computations: this is worth most of the speed. That order is all keys, then all values,
// or, where a token's values lie beside its keys, both of token after token.
class Prefetch {
 public:
  // `tile` may be null: nothing comes next.
  [[gnu::always_inline]] Prefetch(const Tile* tile, const Problem& p) : tile_(tile) {
    if (tile == nullptr) return;
    const std::ptrdiff_t head_bytes = std::ptrdiff_t{p.head_dim} * size_of(p.key_element);
    stride_[0] = p.keys.head_stride;
    stride_[1] = p.values.head_stride;
    const bool is_dense = stride_[0] == head_bytes && stride_[1] == head_bytes;
    n_runs_ = is_dense ? 1 : tile->item->n_heads;
    run_bytes_ = is_dense ? head_bytes * tile->item->n_heads : head_bytes;
    const std::ptrdiff_t apart = p.values.data - p.keys.data;
    is_side_by_side_ = -p.keys.position_stride < apart && apart < p.keys.position_stride;
    enter();
  }

  // How many lines a step has to ask for so that `n_steps` ask for half of all.
  [[gnu::always_inline]] int lines_per_step(int n_steps) const {
    const std::ptrdiff_t lines = kTile * n_runs_ * ((run_bytes_ + 2 * kLine - 2) / kLine);
    return static_cast<int>((lines + n_steps - 1) / n_steps);
  }

  [[gnu::always_inline]] void step(int n_lines) {
    for (; n_lines > 0 && at_ != nullptr; --n_lines) {
      __builtin_prefetch(at_, 0, 3);
      at_ += kLine;
      if (at_ >= end_) leave();
    }
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64;

  [[gnu::always_inline]] void enter() {
    const char* run = (plane_ == 0 ? tile_->keys : tile_->values)[row_] + run_ * stride_[plane_];
    at_ = run - reinterpret_cast<std::uintptr_t>(run) % kLine;
    end_ = run + run_bytes_;
  }
  [[gnu::always_inline]] void leave() {
    if (++run_ == n_runs_) {
      run_ = 0;
      int &inner = is_side_by_side_ ? plane_ : row_, &outer = is_side_by_side_ ? row_ : plane_;
      if (++inner == (is_side_by_side_ ? 2 : kTile)) {
        inner = 0;
        if (++outer == (is_side_by_side_ ? kTile : 2)) {
          at_ = nullptr;
          return;
        }
      }
    }
    enter();
  }

  const Tile* tile_;
  std::ptrdiff_t stride_[2] = {}, run_bytes_ = 0;
  bool is_side_by_side_ = false;
  int n_runs_ = 0, run_ = 0, plane_ = 0, row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace kvspan::flash::KVSPAN_LEVEL
