#include "kernel/decode.hpp"

#include <cstddef>
#include <memory>
#include <new>

#include "kernel/plan.hpp"
#include "kernel/threads.hpp"

namespace kvspan::flash {

namespace {

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
};

class Call {
 public:
  Call(const Problem& problem, const Level& level, int n_threads)
      : problem_(problem),
        plan_(make_plan(problem, level.lanes, n_threads)),
        kernel_(level.kernel(problem.key_element, plan_.layout.block_rows)),
        part_size_(static_cast<std::size_t>(plan_.layout.part_size())),
        // The leading part, its own part, and scratch.
        piece_size_(2 * part_size_ + static_cast<std::size_t>(plan_.layout.scratch_size())),
        memory_(static_cast<float*>(
            ::operator new(static_cast<std::size_t>(plan_.n_pieces()) * piece_size_ * sizeof(float),
                           kAlignment))) {}

  void run(int n_threads) {
    run_parallel(
        plan_.n_pieces(), n_threads, [](void* self, int i) { static_cast<Call*>(self)->attend(i); },
        this);
    const int n_joins = static_cast<int>(plan_.unfinished.size()) * plan_.layout.max_heads;
    run_parallel(
        n_joins, n_joins * static_cast<int>(part_size_) < kLeastJoin ? 1 : n_threads,
        [](void* self, int i) { static_cast<Call*>(self)->join(i); }, this);
  }

 private:
  // Floats; joining less than this takes no longer than waking other threads.
  static constexpr int kLeastJoin = 1 << 16;

  float* memory(int piece) const {
    return memory_.get() + static_cast<std::size_t>(piece) * piece_size_;
  }

  void attend(int i) const {
    const auto at = static_cast<std::size_t>(i);
    const std::int64_t begin = plan_.cuts[at];
    float* const leading = memory(i);
    float* const own = leading + part_size_;
    kernel_.attend({&problem_, &plan_.layout, plan_.items.data(), plan_.item_of(begin), begin,
                    plan_.cuts[at + 1], leading, own, own + part_size_});
  }

  // One KV head of one unfinished item.
  void join(int i) const {
    const int head = i % plan_.layout.max_heads;
    const int number = plan_.unfinished[static_cast<std::size_t>(i / plan_.layout.max_heads)];
    const Item& item = plan_.items[static_cast<std::size_t>(number)];
    if (head >= item.n_heads) return;
    Join join{&problem_, &plan_.layout, &item, head, 0, nullptr, nullptr, 0};
    if (item.n_tiles() > 0) {
      const int first = plan_.piece_of(item.first_tile);
      join.n_parts = plan_.piece_of(item.last_tile() - 1) - first + 1;
      join.first = memory(first) + part_size_;
      join.others = memory(first) + piece_size_;
      join.stride = static_cast<std::ptrdiff_t>(piece_size_);
    }
    kernel_.finish(join);
  }

  const Problem& problem_;
  const Plan plan_;
  const Kernel kernel_;
  const std::size_t part_size_, piece_size_;
  const std::unique_ptr<float, Free> memory_;
};

}  // namespace

void decode(const Problem& problem, const Level& level, int n_threads) {
  Call(problem, level, n_threads).run(n_threads);
}

}  // namespace kvspan::flash
