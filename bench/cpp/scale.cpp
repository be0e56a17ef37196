// What the bookkeeping costs as a pool grows: time per operation and bytes per frame and sequence,
// over a backend that does nothing, so that no driver's books are measured. A tenth as many slots
// as frames, nearly all taken, sequences of mixed lengths picked at random: what is touched next is
// in no cache once the tables outgrow it.
#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <vector>

#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "core/sizes.hpp"
#include "null_backend.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr std::uint32_t kFramesPerSlot = 10;
constexpr std::size_t kBatchRows = 64;
constexpr int kTokensPerPage = 16;  // Llama-3-8B in pages of 2 MiB
constexpr int kMaxPages = 16;       // of a sequence; 8 on average

std::shared_ptr<FrameStore> make_store(std::uint32_t n_frames) {
  auto backend = std::make_unique<bench::NullBackend>();
  const Bytes capacity = backend->traits().page_size * n_frames;
  return std::make_shared<FrameStore>(std::move(backend), capacity, SizeClass(0));
}

std::shared_ptr<Cache> make_cache(std::shared_ptr<FrameStore> store, std::uint32_t n_slots) {
  CacheOptions options;
  options.layers.assign(32, {.planes = {{"k", DType::bf16, 8, 128}, {"v", DType::bf16, 8, 128}}});
  options.max_seqs = static_cast<std::int32_t>(n_slots);
  options.max_seq_len = Tokens(kTokensPerPage * 64);
  options.layers_per_page = 32;
  return Cache::make(std::move(store), options);
}

struct Memory {
  std::size_t allocated = 0, resident = 0;

  static Memory now() {
    malloc_trim(0);
    const struct mallinfo2 info = mallinfo2();
    std::size_t total = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> total >> resident;
    return {info.uordblks + info.hblkhd, resident * 4096};
  }
};

void print_bytes(const std::string& name, Memory before, Memory after, std::size_t n) {
  const auto each = [&](std::size_t from, std::size_t to) {
    return (static_cast<double>(to) - static_cast<double>(from)) / static_cast<double>(n);
  };
  bench::print_samples(name, {each(before.resident, after.resident)}, "B");
  bench::print_samples(name + ", allocated", {each(before.allocated, after.allocated)}, "B");
}

// One pool with nearly all slots taken, and the operations on it.
class Scene {
 public:
  explicit Scene(std::uint32_t n_frames) : n_frames_(n_frames), random_(n_frames) {}

  void fill() {
    const std::uint32_t n_slots = n_frames_ / kFramesPerSlot;
    const Memory empty = Memory::now();
    store_ = make_store(n_frames_);
    {
      std::vector<FrameStore::Taken> taken;
      taken.reserve(n_frames_);
      const FrameStore::Gap all[] = {{Pages(n_frames_), store_->new_owner(), false}};
      store_->take(all, taken);
      store_->give_back(taken);
    }
    print_bytes(label("bytes a frame"), empty, Memory::now(), n_frames_);
    const Memory with_store = Memory::now();
    cache_ = make_cache(store_, n_slots);
    const Memory with_slots = Memory::now();
    print_bytes(label("bytes a free slot"), with_store, with_slots, n_slots);
    const std::uint32_t n_live = n_slots - std::max(n_slots / 50, 2u);
    sequences_.reserve(n_slots);
    const Memory before = Memory::now();
    for (std::uint32_t i = 0; i < n_live; ++i) sequences_.push_back(cache_->sequence(Tokens(0)));
    const Memory with_sequences = Memory::now();
    print_bytes(label("bytes a sequence more"), before, with_sequences, n_live);
    std::size_t n_pages = 0;
    for (const auto& sequence : sequences_) {
      const int pages = length();
      n_pages += static_cast<std::size_t>(pages);
      sequence->extend(Tokens(kTokensPerPage * pages - 8), {});
    }
    print_bytes(label("bytes a mapped page more"), with_sequences, Memory::now(), n_pages);
    // So that frames, slots and heap are as after a while of serving.
    for (std::uint32_t i = 0; i < n_live; ++i) replace(pick());
  }

  // `in_caches`: what an operation touches may be in the processor's caches, as far as they reach;
  // otherwise they hold something else when the operations on `kBatchRows` sequences begin.
  void measure(int repeats, bool in_caches) {
    std::vector<double> begin, extend, map, release, step, take;
    std::vector<FrameStore::Taken> taken;
    std::vector<FrameId> frames(16);
    const FrameStore::Gap gap[] = {{Pages(16), store_->new_owner(), false}};
    for (int repeat = -1; repeat < repeats; ++repeat) {
      const auto each = [&](std::vector<double>& samples, auto f) {
        const std::vector<std::size_t> picks = choose();
        if (!in_caches) flush();
        const double seconds = bench::timed([&] {
          for (const std::size_t i : picks) f(i);
        });
        if (repeat >= 0) samples.push_back(seconds / static_cast<double>(picks.size()));
      };
      each(extend, [&](std::size_t i) { sequences_[i]->extend(Tokens(1), {}); });
      each(map, [&](std::size_t i) { sequences_[i]->extend(Tokens(kTokensPerPage), {}); });
      each(take, [&](std::size_t) {
        store_->take(gap, taken);
        std::ranges::transform(taken, frames.begin(), &FrameStore::Taken::frame);
        store_->give(frames);
        taken.clear();
      });
      std::vector<std::shared_ptr<Sequence>> rows;
      for (const std::size_t i : choose()) rows.push_back(sequences_[i]);
      const auto batch = cache_->batch(std::move(rows));
      if (!in_caches) flush();
      const double seconds = bench::timed([&] { batch->step(Tokens(1), {}); });
      if (repeat >= 0) step.push_back(seconds);
      const std::vector<std::size_t> replaced = choose();
      each(release, [&, next = std::size_t{0}](std::size_t) mutable {
        sequences_[replaced[next++]]->release({});
      });
      each(begin, [&, next = std::size_t{0}](std::size_t) mutable {
        sequences_[replaced[next++]] = cache_->sequence(Tokens(kTokensPerPage * 4));
      });
      for (const std::size_t i : replaced) sequences_[i]->extend(prompt(), {});
      for (std::size_t i = 0; i < sequences_.size(); ++i) keep_short(i);
    }
    const std::string where = in_caches ? "" : " (caches cold)";
    bench::print_samples(label("begin" + where), begin);
    bench::print_samples(label("extend within a page" + where), extend);
    bench::print_samples(label("extend into a new page" + where), map);
    bench::print_samples(label("step of 64" + where), step);
    bench::print_samples(label("release" + where), release);
    bench::print_samples(label("take and give 16 frames" + where), take);
  }

  void measure_round(int repeats) {
    std::vector<double> rounds;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      rounds.push_back(bench::timed([&] { store_->background().turn(); }));
    }
    bench::print_samples(label("a look of the background's"), rounds);
  }

 private:
  std::string label(const std::string& what) const {
    return what + ", " + std::to_string(n_frames_) + " frames";
  }
  std::size_t pick() {
    return std::uniform_int_distribution<std::size_t>(0, sequences_.size() - 1)(random_);
  }
  int length() { return std::uniform_int_distribution<int>(1, kMaxPages - 1)(random_); }
  Tokens prompt() { return Tokens(kTokensPerPage * length() - 8); }

  // Different sequences in random order, as many as a batch has rows.
  std::vector<std::size_t> choose() {
    std::vector<std::size_t> chosen;
    while (chosen.size() < kBatchRows) {
      const std::size_t i = pick();
      if (std::ranges::find(chosen, i) == chosen.end()) chosen.push_back(i);
    }
    return chosen;
  }

  void replace(std::size_t i) {
    sequences_[i]->release({});
    sequences_[i] = cache_->sequence(Tokens(64));
    sequences_[i]->extend(prompt(), {});
  }

  // Eight tokens before the end of a page again, of the last one allowed at most.
  void keep_short(std::size_t i) {
    const Tokens now = sequences_[i]->length();
    const auto page = std::clamp<std::int64_t>(now.value / kTokensPerPage, 1, kMaxPages - 1);
    const Tokens wanted(page * kTokensPerPage - 8);
    if (now > wanted) sequences_[i]->truncate(wanted, {});
  }

  // Leaves other data in all levels of cache.
  void flush() {
    for (std::size_t i = 0; i < other_.size(); i += 64) other_[i] = static_cast<char>(i);
  }

  const std::uint32_t n_frames_;
  std::mt19937_64 random_;
  std::vector<char> other_ = std::vector<char>(96 << 20);
  std::shared_ptr<FrameStore> store_;
  std::shared_ptr<Cache> cache_;
  std::vector<std::shared_ptr<Sequence>> sequences_;
};

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  for (const std::uint32_t n_frames : {1000u, 10000u, 100000u, 1000000u}) {
    Scene scene(n_frames);
    scene.fill();
    scene.measure(repeats, true);
    scene.measure(repeats, false);
    scene.measure_round(repeats);
  }
}
