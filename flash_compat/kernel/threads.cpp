#include "kernel/threads.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace kvspan::flash {

namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned n_threads, unsigned flags);

// A look-up in torch's library also looks through what it depends on.
GompParallel find_gomp_parallel() {
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return nullptr;
  const auto found = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
  dlclose(torch);  // torch itself keeps it loaded
  return found;
}

struct Work {
  int n;
  void (*work)(void* context, int i);
  void* context;
  std::atomic<int> next{0};

  // However many threads the runtime gives: in a parallel region it gives one.
  static void run(void* self) noexcept {
    auto& work = *static_cast<Work*>(self);
    // Relaxed: only who does what hangs on it; the end of the region orders the results.
    for (int i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.n;) {
      work.work(work.context, i);
    }
  }
};

}  // namespace

void run_parallel(int n, int n_threads, void (*work)(void* context, int i), void* context) {
  Work shared{.n = n, .work = work, .context = context};
  if (std::min(n, n_threads) <= 1) return Work::run(&shared);

  static const GompParallel gomp_parallel = find_gomp_parallel();
  // All of torch's threads, also when there is less to do: asked for fewer, the runtime would end
  // the others, and start them again when torch next wants them.
  if (gomp_parallel != nullptr) {
    return gomp_parallel(Work::run, &shared, static_cast<unsigned>(n_threads), 0);
  }
  std::vector<std::jthread> threads;
  try {
    while (static_cast<int>(threads.size()) < std::min(n, n_threads) - 1) {
      threads.emplace_back(Work::run, &shared);
    }
  } catch (const std::system_error&) {
    // Fewer will do.
  }
  Work::run(&shared);
}

}  // namespace kvspan::flash
