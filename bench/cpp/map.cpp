// What mapping pages costs through a sequence, beside the system calls that it cannot do without:
// the same mmap of the same number of huge pages of a memfd. Frames exist already in both;
// unmapping is not timed. The two alternate.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "backend/host_backend.hpp"
#include "cache/cache.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;

constexpr Bytes kPage = kMiB * 2;
constexpr std::uint32_t kMostPages = 64;
constexpr int kRounds = 50;  // in a sample
constexpr int kMadvCollapse = 25;

void require(bool ok, const char* what) {
  if (ok) return;
  std::perror(what);
  std::exit(1);
}

// A memfd of huge pages and a reservation, by hand.
class Raw {
 public:
  Raw() : fd_(memfd_create("raw", MFD_CLOEXEC)) {
    const std::size_t size = kPage.value * kMostPages;
    require(fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(size)) == 0, "memfd");
    void* const space = mmap(nullptr, size + kPage.value, PROT_READ,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(space != MAP_FAILED, "mmap");
    base_ = round_up(reinterpret_cast<std::uintptr_t>(space), kPage.value);
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

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 9;
  const Bytes capacity = kPage * kMostPages;
  auto store = std::make_shared<FrameStore>(
      make_host_backend({.page_size = kPage, .capacity = capacity}), capacity, SizeClass(0));
  store->create_ahead(capacity);

  // Llama-3-8B: 128 KiB a token, 16 tokens a page.
  CacheOptions options;
  options.layers.assign(32, {.planes = {{"k", DType::bf16, 8, 128}, {"v", DType::bf16, 8, 128}}});
  options.max_seqs = 1;
  options.max_seq_len = Tokens(16 * kMostPages);
  options.keep = Bytes(0);  // what is truncated is unmapped
  const auto cache = Cache::make(store, options);
  const auto sequence = cache->sequence(Tokens(0));
  Raw raw;
  std::printf("{\"raw_is_huge\": %s, \"span_huge_bytes\": %llu}\n",
              raw.is_huge() ? "true" : "false",
              static_cast<unsigned long long>(store->backend().huge_pages().huge.value));

  for (const std::uint32_t pages : {1u, 16u, 64u}) {
    std::vector<double> of_span, of_raw;
    for (int repeat = -1; repeat < repeats; ++repeat) {
      double span_seconds = 0, raw_seconds = 0;
      for (int i = 0; i < kRounds; ++i) {
        raw_seconds += bench::timed([&] { raw.map(pages); });
        raw.unmap(pages);
        span_seconds += bench::timed([&] { sequence->extend(Tokens(16 * pages), {}); });
        sequence->truncate(Tokens(0), {});
      }
      if (repeat < 0) continue;
      of_span.push_back(span_seconds / kRounds);
      of_raw.push_back(raw_seconds / kRounds);
    }
    const std::string suffix = ", " + std::to_string(pages) + " pages";
    bench::print_samples("raw mmap" + suffix, of_raw);
    bench::print_samples("extend" + suffix, of_span);
  }
}
