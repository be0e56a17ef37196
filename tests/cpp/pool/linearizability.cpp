#include "pool/linearizability.hpp"

#include <algorithm>
#include <compare>
#include <limits>
#include <set>
#include <span>

namespace kvspan_test {

namespace {

using Stamp = Operation::Stamp;
constexpr Stamp kNever = std::numeric_limits<Stamp>::max();

// A part of a history: some operations in a row of each thread.
using Segment = std::vector<std::span<const Operation>>;

class Search {
 public:
  explicit Search(const Segment& segment) : segment_(segment) {}

  // The state after all, if some order explains them.
  std::optional<PoolModel> run(const PoolModel& before) {
    return go_on({std::vector<Position>(segment_.size()), before});
  }

 private:
  struct Position {
    std::size_t n_done = 0;
    Progress next;  // of the operation after those

    auto operator<=>(const Position&) const = default;
  };
  struct Configuration {
    std::vector<Position> threads;
    PoolModel model;

    auto operator<=>(const Configuration&) const = default;
  };

  std::optional<PoolModel> go_on(const Configuration& now) {
    Stamp first_end = kNever;
    for (std::size_t i = 0; i < segment_.size(); ++i) {
      if (const Operation* next = next_of(now, i)) first_end = std::min(first_end, next->end);
    }
    if (first_end == kNever) return now.model;
    if (!visited_.insert(now).second) return std::nullopt;
    for (std::size_t i = 0; i < segment_.size(); ++i) {
      const Operation* next = next_of(now, i);
      if (next == nullptr || next->begin > first_end) continue;
      const std::size_t n_ways = PoolModel::n_ways(*next, now.threads[i].next);
      for (std::size_t way = 0; way < n_ways; ++way) {
        Configuration then = now;
        Position& position = then.threads[i];
        if (!then.model.step(*next, position.next, way)) continue;
        if (PoolModel::is_done(*next, position.next)) position = {position.n_done + 1, {}};
        if (std::optional<PoolModel> after = go_on(then)) return after;
      }
    }
    return std::nullopt;
  }

  const Operation* next_of(const Configuration& now, std::size_t thread) const {
    const std::size_t n_done = now.threads[thread].n_done;
    return n_done < segment_[thread].size() ? &segment_[thread][n_done] : nullptr;
  }

  const Segment& segment_;
  std::set<Configuration> visited_;
};

// Takes the operations up to the first moment when none is underway off the rest.
Segment cut(Segment& rest) {
  std::vector<std::size_t> n(rest.size());
  for (Stamp end = kNever;;) {
    // The one that begins next.
    std::size_t first = rest.size();
    for (std::size_t i = 0; i < rest.size(); ++i) {
      if (n[i] == rest[i].size()) continue;
      if (first == rest.size() || rest[i][n[i]].begin < rest[first][n[first]].begin) first = i;
    }
    if (first == rest.size()) break;
    const Operation& next = rest[first][n[first]];
    if (end != kNever && next.begin > end) break;
    end = end == kNever ? next.end : std::max(end, next.end);
    ++n[first];
  }
  Segment segment;
  for (std::size_t i = 0; i < rest.size(); ++i) {
    segment.push_back(rest[i].first(n[i]));
    rest[i] = rest[i].subspan(n[i]);
  }
  return segment;
}

std::string describe(const Segment& segment, const PoolModel& before) {
  const FramePool::Counts counts = before.counts();
  std::string text = "no order explains, from " + std::to_string(counts.fresh) + " fresh, " +
                     std::to_string(counts.free) + " free, " + std::to_string(counts.in_use) +
                     " in use:\n";
  Stamp origin = kNever;
  for (const std::span<const Operation> part : segment) {
    if (!part.empty()) origin = std::min(origin, part.front().begin);
  }
  for (std::size_t i = 0; i < segment.size(); ++i) {
    for (const Operation& operation : segment[i]) {
      text += "  thread " + std::to_string(i) + ": " + describe(operation, origin) + "\n";
    }
  }
  return text;
}

}  // namespace

std::optional<std::string> find_unexplained(const std::vector<Log>& logs, PoolModel& model) {
  Segment rest(logs.begin(), logs.end());
  const auto is_empty = [](std::span<const Operation> part) { return part.empty(); };
  while (!std::all_of(rest.begin(), rest.end(), is_empty)) {
    const Segment segment = cut(rest);
    const std::optional<PoolModel> after = Search(segment).run(model);
    if (!after) return describe(segment, model);
    model = *after;
  }
  return std::nullopt;
}

}  // namespace kvspan_test
