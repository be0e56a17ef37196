// How many atomic read-modify-writes a call makes, counted and not estimated: a child process is
// stepped through the call one instruction at a time, and those with a lock prefix (or an xchg with
// memory, which has one without saying so) are counted. The product's code is the one that is
// shipped; a second thread exists, so that the library leaves no lock prefix out.
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "null_backend.hpp"
#include "samples.hpp"

#ifndef __x86_64__
#error "the decoder below knows x86-64 only"
#endif
#include <sys/user.h>

namespace {

using namespace kvspan;

constexpr std::uint32_t kFrames = 4096;
constexpr int kPage = 16;  // tokens

void require(bool ok, const char* what) {
  if (ok) return;
  std::perror(what);
  std::exit(1);
}

struct Counted {
  unsigned atomics = 0;
  unsigned long instructions = 0;
};

// Whether the instruction writes memory atomically.
bool is_atomic(const unsigned char* code) {
  for (;; ++code) {
    switch (*code) {
      case 0xf0:  // lock
        return true;
      case 0x2e:
      case 0x36:
      case 0x3e:
      case 0x26:
      case 0x64:
      case 0x65:
      case 0x66:
      case 0x67:
      case 0xf2:
      case 0xf3:
        continue;  // other prefixes
      default:
        break;
    }
    if ((*code & 0xf0) == 0x40) continue;  // REX
    const bool is_register = code[1] >= 0xc0;
    return (*code == 0x86 || *code == 0x87) && !is_register;  // xchg
  }
}

// The child raises SIGTRAP before the call and after it.
Counted count(const std::function<void(const std::function<void()>&)>& scene) {
  const pid_t child = fork();
  require(child >= 0, "fork");
  if (child == 0) {
    require(ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) == 0, "ptrace");
    std::thread([] { pause(); }).detach();
    scene([] { asm volatile("int3" ::: "memory"); });
    _exit(0);
  }
  int status = 0;
  const auto stopped = [&] {
    require(waitpid(child, &status, 0) == child, "waitpid");
    return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
  };
  require(stopped(), "the scene did not begin");
  Counted counted;
  for (;;) {
    user_regs_struct registers{};
    require(ptrace(PTRACE_GETREGS, child, nullptr, &registers) == 0, "PTRACE_GETREGS");
    unsigned char code[16];
    for (std::size_t i = 0; i < sizeof code; i += sizeof(long)) {
      const long word = ptrace(PTRACE_PEEKTEXT, child, registers.rip + i, nullptr);
      std::memcpy(code + i, &word, sizeof word);
    }
    constexpr unsigned char kBreakpoint = 0xcc;
    if (code[0] == kBreakpoint) break;
    counted.atomics += is_atomic(code);
    ++counted.instructions;
    require(ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) == 0, "PTRACE_SINGLESTEP");
    require(stopped(), "the scene ended early");
  }
  require(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child, "the end");
  return counted;
}

struct Scene {
  explicit Scene(std::optional<Bytes> keep = {}) {
    auto backend = std::make_unique<bench::NullBackend>();
    const Bytes capacity = backend->traits().page_size * kFrames;
    store = std::make_shared<FrameStore>(std::move(backend), capacity, SizeClass(0));
    store->create_ahead(capacity);
    CacheOptions options;
    options.layers.assign(32, {.planes = {{"k", DType::bf16, 8, 128}, {"v", DType::bf16, 8, 128}}});
    options.max_seqs = 1025;
    options.max_seq_len = Tokens(kPage * 256);
    options.layers_per_page = 32;
    options.keep = keep;
    cache = Cache::make(store, options);
    sequence = cache->sequence(Tokens(0));
    sequence->extend(Tokens(1), {});
    sequence->extend(Tokens(1), {});
  }

  std::shared_ptr<FrameStore> store;
  std::shared_ptr<Cache> cache;
  std::shared_ptr<Sequence> sequence;
};

void print(const std::string& name, const Counted& counted) {
  bench::print_samples(name, {static_cast<double>(counted.atomics)}, "");
}

}  // namespace

int main() {
  using Mark = std::function<void()>;
  print("nothing", count([](const Mark& mark) { mark(), mark(); }));
  print("one fetch_add", count([](const Mark& mark) {
          std::atomic<int> number{0};
          mark();
          number.fetch_add(1);
          mark();
        }));
  print("extend within a page", count([](const Mark& mark) {
          const Scene scene;
          mark();
          scene.sequence->extend(Tokens(1), {});
          mark();
        }));
  for (const int pages : {1, 16, 64}) {
    print("extend by " + std::to_string(pages) + " pages", count([&](const Mark& mark) {
            const Scene scene;
            mark();
            scene.sequence->extend(Tokens(kPage * pages), {});
            mark();
          }));
  }
  for (const int rows : {1, 256, 1024}) {
    print("step of " + std::to_string(rows), count([&](const Mark& mark) {
            const Scene scene;
            const auto batch = scene.cache->adjacent_batch(rows);
            batch->step(Tokens(1), {});
            mark();
            batch->step(Tokens(1), {});
            mark();
          }));
  }
  print("begin", count([](const Mark& mark) {
          const Scene scene;
          mark();
          const auto sequence = scene.cache->sequence(Tokens(100));
          mark();
        }));
  print("release, pages kept", count([](const Mark& mark) {
          const Scene scene;
          mark();
          scene.sequence->release({});
          mark();
        }));
  print("release, 63 pages given back", count([](const Mark& mark) {
          const Scene scene(bench::NullBackend().traits().page_size);
          scene.sequence->extend(Tokens(kPage * 64), {});
          mark();
          scene.sequence->release({});
          mark();
        }));
  for (const std::uint32_t n : {1u, 16u, 256u}) {
    print("take and give " + std::to_string(n) + " frames", count([&](const Mark& mark) {
            const Scene scene;
            const FrameStore::Gap gap[] = {{Pages(n), scene.store->new_owner(), false}};
            std::vector<FrameStore::Taken> taken;
            std::vector<FrameId> frames(n);
            taken.reserve(n);
            mark();
            scene.store->take(gap, taken);
            std::ranges::transform(taken, frames.begin(), &FrameStore::Taken::frame);
            scene.store->give(frames);
            mark();
          }));
  }
}
