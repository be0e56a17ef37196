// What mapping pages costs through a sequence, beside the system calls that it cannot do without:
// the same mmap of the same number of huge pages of a memfd. Frames exist already in both;
// unmapping is not timed. A third sequence, over a backend that does nothing, shows what the pool
// and the page tables take of it. The three alternate.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "backend/host_backend.hpp"
#include "cache/cache.hpp"
#include "cache/sequence.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "null_backend.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr Bytes kPage = kMiB * 2;
constexpr std::uint32_t kMostPages = 64;
constexpr int kSlots = 3;
constexpr int kRounds = 50;  // in a sample
constexpr int kMadvCollapse = 25;

void require(bool ok, const char* what) {
  if (ok) return;
  std::perror(what);
  std::exit(1);
}

// A memfd of huge pages and a reservation, by hand. Pages are mapped in its middle, as those of
// most slots are: at the edge of a mapping the kernel has up to 1.5 us less to split and merge, and
// which reservations touch one another is a matter of luck.
class Raw {
 public:
  Raw() : fd_(memfd_create("raw", MFD_CLOEXEC)) {
    const std::size_t size = kPage.value * kMostPages;
    require(fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(size)) == 0, "memfd");
    void* const space =
        mmap(nullptr, kSlots * size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(space != MAP_FAILED, "mmap");
    base_ = round_up(reinterpret_cast<std::uintptr_t>(space) + size, kPage.value);
    map(kMostPages);
    is_huge_ = madvise(at(), size, kMadvCollapse) == 0;
    unmap(kMostPages);
  }

  bool is_huge() const { return is_huge_; }
  void* at() const { return reinterpret_cast<void*>(base_); }

  void map(std::uint32_t pages) {
    require(mmap(at(), kPage.value * pages, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd_, 0) != MAP_FAILED,
            "mmap of the memfd");
  }

  void unmap(std::uint32_t pages) {
    require(mmap(at(), kPage.value * pages, PROT_READ,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED,
            "mmap of the reservation");
  }

 private:
  int fd_;
  std::uintptr_t base_ = 0;
  bool is_huge_ = false;
};

// Sequences of Llama-3-8B, 128 KiB a token, 16 tokens a page, in all slots; what is truncated is
// unmapped.
std::vector<std::shared_ptr<Sequence>> make_sequences(std::shared_ptr<FrameStore> store) {
  CacheOptions options;
  options.layers.assign(32, {.planes = {{"k", DType::bf16, 8, 128}, {"v", DType::bf16, 8, 128}}});
  options.max_seqs = kSlots;
  options.max_seq_len = Tokens(16 * kMostPages);
  options.keep = Bytes(0);
  const auto cache = Cache::make(std::move(store), options);
  std::vector<std::shared_ptr<Sequence>> sequences;
  for (int slot = 0; slot < kSlots; ++slot) sequences.push_back(cache->sequence(Tokens(0)));
  return sequences;
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  const Bytes capacity = kPage * kMostPages;
  auto store = std::make_shared<FrameStore>(
      make_host_backend({.page_size = kPage, .capacity = capacity}), capacity, SizeClass(0));
  store->create_ahead(capacity);

  const auto sequences = make_sequences(store);
  const auto& sequence = sequences[kSlots / 2];
  auto nowhere =
      std::make_shared<FrameStore>(std::make_unique<bench::NullBackend>(), capacity, SizeClass(0));
  nowhere->create_ahead(capacity);
  const auto nowhere_sequences = make_sequences(nowhere);
  const auto& tables_only = nowhere_sequences[kSlots / 2];
  Raw raw;
  std::printf("{\"raw_is_huge\": %s, \"span_huge_bytes\": %llu}\n",
              raw.is_huge() ? "true" : "false",
              static_cast<unsigned long long>(store->backend().huge_pages().huge.value));

  for (const std::uint32_t pages : {1u, 16u, 64u}) {
    std::vector<double> of_span, of_raw, of_tables;
    for (int repeat = -1; repeat < repeats; ++repeat) {
      double span_seconds = 0, raw_seconds = 0, table_seconds = 0;
      for (int i = 0; i < kRounds; ++i) {
        const auto map_raw = [&] {
          raw_seconds += bench::timed([&] { raw.map(pages); });
          raw.unmap(pages);
        };
        if (i % 2 == 0) map_raw();
        span_seconds += bench::timed([&] { sequence->extend(Tokens(16 * pages), {}); });
        sequence->truncate(Tokens(0), {});
        if (i % 2 != 0) map_raw();
        table_seconds += bench::timed([&] { tables_only->extend(Tokens(16 * pages), {}); });
        tables_only->truncate(Tokens(0), {});
      }
      if (repeat < 0) continue;
      of_span.push_back(span_seconds / kRounds);
      of_raw.push_back(raw_seconds / kRounds);
      of_tables.push_back(table_seconds / kRounds);
    }
    const std::string suffix = ", " + std::to_string(pages) + " pages";
    bench::print_samples("raw mmap" + suffix, of_raw);
    bench::print_samples("extend" + suffix, of_span);
    bench::print_samples("pool and page tables" + suffix, of_tables);
  }
}
