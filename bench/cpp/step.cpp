// What Batch::step and Sequence::extend cost while nobody crosses into an unmapped page. Every slot
// keeps its pages when its sequence is truncated, so the same pages serve every sample.
#include <memory>
#include <vector>

#include "backend/host_backend.hpp"
#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "core/sizes.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr int kRounds = 1000;  // in a sample

std::shared_ptr<Cache> make_cache(std::int32_t n_seqs) {
  const Bytes page_size = kKiB * 64;
  const Bytes capacity = kMiB * 512;
  auto store = std::make_shared<FrameStore>(
      make_host_backend({.page_size = page_size, .capacity = capacity, .huge_pages = false}),
      capacity, SizeClass(0));
  CacheOptions options;
  options.layers = {{.planes = {{"k", DType::f32, 1, 16}, {"v", DType::f32, 1, 16}}}};
  options.max_seqs = n_seqs;
  options.max_seq_len = Tokens(kRounds + 24);
  options.keep = capacity;
  return Cache::make(std::move(store), options);
}

std::vector<double> measure_steps(std::int32_t rows, int repeats) {
  const auto cache = make_cache(rows);
  const auto batch = cache->adjacent_batch(rows);
  std::vector<double> samples;
  for (int repeat = -1; repeat < repeats; ++repeat) {
    const double seconds = bench::timed([&] {
      for (int i = 0; i < kRounds; ++i) batch->step(Tokens(1), {});
    });
    if (repeat >= 0) samples.push_back(seconds / kRounds);  // the first one mapped the pages
    for (const auto& row : batch->rows()) row->truncate(Tokens(0), {});
  }
  return samples;
}

std::vector<double> measure_extends(int repeats) {
  const auto cache = make_cache(1);
  const auto sequence = cache->sequence(Tokens(0));
  std::vector<double> samples;
  for (int repeat = -1; repeat < repeats; ++repeat) {
    const double seconds = bench::timed([&] {
      for (int i = 0; i < kRounds; ++i) sequence->extend(Tokens(1), {});
    });
    if (repeat >= 0) samples.push_back(seconds / kRounds);
    sequence->truncate(Tokens(0), {});
  }
  return samples;
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  for (const std::int32_t rows : {1, 32, 256, 1024}) {
    bench::print_samples("native step, " + std::to_string(rows) + " rows",
                         measure_steps(rows, repeats));
  }
  bench::print_samples("native extend by 1", measure_extends(repeats));
}
