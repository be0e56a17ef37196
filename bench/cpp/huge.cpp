// Reading memory of one backend in small pages, of one in pages that the kernel collapsed, and of
// one in hugetlb pages where enough are set aside: the same bytes, in turn.
//
// `chase`: each load's address comes out of the one before, so that nothing hides a TLB miss.
// `gather`: records of 256 bytes (a token's keys of one head of 128 in bf16) in random order, which
// processors overlap. `stream`: everything from one end to the other.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "backend/host_backend.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "perf_counter.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr std::uint64_t kLine = 64, kRecord = 256;
constexpr std::uint64_t kChased = 1 << 19, kGathered = 1 << 19;  // loads, records in a sample

struct Memory {
  std::string name;
  std::unique_ptr<Backend> backend;
  std::uint64_t* words;

  std::uint64_t* line(std::uint64_t i) const { return words + i * (kLine / 8); }
};

std::optional<Memory> make(const char* name, Bytes size, bool huge, Hugetlb hugetlb) {
  try {
    auto backend = make_host_backend({.capacity = size, .huge_pages = huge, .hugetlb = hugetlb});
    const FrameRun all{FrameId(SizeClass(0), 0),
                       static_cast<std::uint32_t>(size.value / backend->traits().page_size.value)};
    backend->create(all);
    const VirtualRange range = backend->reserve(size, Unmapped::fault);
    backend->map(range.base, all, Access::read_write);
    const HugePages pages = backend->huge_pages();
    if (huge && pages.small != Bytes(0)) {
      std::fprintf(stderr, "%s: left out: %s\n", name, pages.refusal.c_str());
      return {};
    }
    return Memory{name, std::move(backend), reinterpret_cast<std::uint64_t*>(range.base.value)};
  } catch (const Error& e) {
    std::fprintf(stderr, "%s: left out: %s\n", name, e.what());
    return {};
  }
}

std::vector<std::uint32_t> shuffled(std::uint64_t n, std::mt19937_64& random) {
  std::vector<std::uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// One measurement over all memories, in turn; `read` returns what must be the same everywhere.
template <class Read>
void measure(const std::string& what, const std::vector<Memory>& memories, int repeats, double n,
             const bench::DtlbMisses& counter, Read read) {
  std::vector<std::vector<double>> seconds(memories.size()), misses(memories.size());
  for (int repeat = -1; repeat < repeats; ++repeat) {
    std::optional<std::uint64_t> first;
    for (std::size_t i = 0; i < memories.size(); ++i) {
      // Whoever comes first in one round comes last in the next.
      const std::size_t m = repeat % 2 == 0 ? i : memories.size() - 1 - i;
      std::uint64_t found = 0;
      const std::uint64_t before = counter.count();
      const double took = bench::timed([&] { found = read(memories[m], repeat + 1); });
      const std::uint64_t counted = counter.count() - before;
      if (first.value_or(found) != found) {
        std::fprintf(stderr, "%s: %s reads something else\n", what.c_str(),
                     memories[m].name.c_str());
        std::exit(1);
      }
      first = found;
      if (repeat < 0) continue;
      seconds[m].push_back(took / n);
      misses[m].push_back(static_cast<double>(counted) / n);
    }
  }
  for (std::size_t m = 0; m < memories.size(); ++m) {
    bench::print_samples(what + ", " + memories[m].name, seconds[m]);
    if (counter.why_not().empty()) {
      bench::print_samples(what + ", " + memories[m].name + ": dTLB misses", misses[m], "misses");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  const Bytes size = kMiB * static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1024);
  std::vector<Memory> memories;
  const auto add = [&](const char* name, bool huge, Hugetlb hugetlb) {
    if (auto memory = make(name, size, huge, hugetlb)) memories.push_back(std::move(*memory));
  };
  add("small pages", false, Hugetlb::never);
  add("collapsed", true, Hugetlb::never);
  add("hugetlb", true, Hugetlb::always);

  const std::uint64_t n_lines = size.value / kLine;
  std::mt19937_64 random(1);
  {
    const auto order = shuffled(n_lines, random);  // one cycle through all lines
    for (std::uint64_t i = 0; i < n_lines; ++i) {
      for (const Memory& m : memories) *m.line(order[i]) = order[(i + 1) % n_lines];
    }
  }
  const auto records = shuffled(size.value / kRecord, random);
  const bench::DtlbMisses counter;
  std::printf("{\"size_bytes\": %llu, \"dtlb_counter\": \"%s\"}\n",
              static_cast<unsigned long long>(size.value),
              counter.why_not().empty() ? "yes" : counter.why_not().c_str());

  // Each sample begins somewhere else, or the caches would hold what it reads.
  const auto start = [](int sample, std::uint64_t n) {
    return static_cast<std::uint64_t>(sample) * 0x9e3779b97f4a7c15u % n;
  };
  measure("chase", memories, repeats, kChased, counter, [&](const Memory& m, int sample) {
    std::uint64_t at = start(sample, n_lines);
    for (std::uint64_t i = 0; i < kChased; ++i) at = *m.line(at);
    return at;
  });
  measure("gather", memories, repeats, kGathered, counter, [&](const Memory& m, int sample) {
    std::uint64_t sum = 0, at = start(sample, records.size());
    for (std::uint64_t i = 0; i < kGathered; ++i, at = at + 1 < records.size() ? at + 1 : 0) {
      const std::uint64_t* record = m.words + records[at] * (kRecord / 8);
      for (std::uint64_t word = 0; word < kRecord / 8; ++word) sum += record[word];
    }
    return sum;
  });
  const double n_pages = static_cast<double>(size.value >> 12);
  measure("stream of 4 KiB", memories, repeats, n_pages, counter, [&](const Memory& m, int) {
    return std::accumulate(m.words, m.words + size.value / 8, std::uint64_t{0});
  });
}
