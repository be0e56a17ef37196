#include "pool/pool_model.hpp"

#include <algorithm>

namespace kvspan_test {

using Kind = Operation::Kind;

PoolModel::PoolModel(std::uint32_t n_frames, std::uint32_t n_in_use, bool lends)
    : references_(n_frames), n_fresh_(n_frames - n_in_use), lends_(lends) {
  std::fill_n(references_.begin(), n_in_use, 1u);
}

bool PoolModel::is_done(const Operation& operation, const Progress& progress) {
  std::size_t n_steps = 1;
  if (operation.is_take() && !operation.is_refused) n_steps = 2;
  if (operation.kind == Kind::share) n_steps = operation.n_frames;
  if (operation.kind == Kind::give) n_steps = operation.n_frames + 1;
  return progress.n_steps == n_steps;
}

std::size_t PoolModel::n_ways(const Operation& operation, const Progress& progress) {
  const bool is_admission = operation.is_take() && !operation.is_refused && progress.n_steps == 0;
  return is_admission ? operation.n_frames + 1 : 1;
}

bool PoolModel::step(const Operation& operation, Progress& progress, std::size_t way) {
  const std::size_t n_steps = progress.n_steps++;
  if (operation.is_take()) {
    if (operation.is_refused) return refuses(operation);
    if (n_steps != 0) return pick(operation.frames().first(progress.n_recycled));
    progress.n_recycled = operation.n_frames - way;
    return admit(operation, progress.n_recycled);
  }
  if (n_steps == operation.n_frames) {
    n_free_ += progress.n_freed;
    return progress.n_freed == operation.result && progress.n_refused == operation.refused;
  }
  const std::size_t index = operation.named[n_steps].index();
  std::uint32_t none = 0;
  std::uint32_t& n_references = index < references_.size() ? references_[index] : none;
  if (operation.kind == Kind::references) {
    return n_references == operation.result;
  }
  if (n_references == 0) {
    ++progress.n_refused;
  } else if (operation.kind == Kind::share) {
    ++n_references;
  } else {
    progress.n_freed += --n_references == 0;
  }
  return operation.kind == Kind::give || !is_done(operation, progress) ||
         progress.n_refused == operation.result;
}

FramePool::Counts PoolModel::counts() const {
  return {.fresh = n_fresh_, .free = n_free_, .in_use = bump() - n_free_};
}

bool PoolModel::refuses(const Operation& operation) const {
  std::size_t n = 0;
  if (operation.kind != Kind::take_recycled) n += n_fresh_;
  if (operation.kind != Kind::take_fresh) n += n_free_;
  return n < operation.n_frames;
}

// The first `n_recycled` are yet to be picked; the others are fresh.
bool PoolModel::admit(const Operation& operation, std::size_t n_recycled) {
  const std::size_t n_fresh = operation.n_frames - n_recycled;
  if (n_recycled > n_free_ || n_fresh > n_fresh_) return false;
  if (operation.kind == Kind::take_recycled && n_fresh != 0) return false;
  if (operation.kind == Kind::take_fresh && n_recycled != 0) return false;
  if (operation.kind == Kind::take && !lends_ && n_fresh != 0 && n_recycled != n_free_) {
    return false;
  }
  for (const FrameId frame : operation.frames().last(n_fresh)) {
    if (frame.index() != bump()) return false;
    references_[bump()] = 1;
    --n_fresh_;
  }
  n_free_ -= static_cast<std::uint32_t>(n_recycled);
  return true;
}

bool PoolModel::pick(std::span<const FrameId> frames) {
  for (const FrameId frame : frames) {
    if (frame.index() >= bump() || references_[frame.index()]++ != 0) return false;
  }
  return true;
}

}  // namespace kvspan_test
