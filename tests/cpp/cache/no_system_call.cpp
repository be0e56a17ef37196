// Proves that growing within a page makes no system call: after the set-up a child process enters
// seccomp's strict mode, in which the kernel kills it for any call but read, write and exit. A
// second child does the same but goes on into the next page, and must be killed: that the proof can
// fail.
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "backend/host_backend.hpp"
#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "core/sizes.hpp"

namespace {

using namespace kvspan;

constexpr int kSkipped = 77;  // ctest's SKIP_RETURN_CODE
constexpr int kTokensPerPage = 1024;

// Grows a sequence and a batch of 256 to `n` tokens each, all but the first in strict mode.
[[noreturn]] void grow_in_strict_mode(int n) {
  const Bytes page_size = kKiB * 64;
  const Bytes capacity = page_size * 1024;
  auto store = std::make_shared<FrameStore>(
      make_host_backend({.page_size = page_size, .capacity = capacity, .huge_pages = false}),
      capacity, SizeClass(0));
  CacheOptions options;
  options.layers = {{.planes = {{"k", DType::f32, 1, 16}}}};
  options.max_seqs = 257;
  options.max_seq_len = Tokens(4 * kTokensPerPage);
  const auto cache = Cache::make(store, options);
  const auto sequence = cache->sequence(Tokens(0));
  const auto batch = cache->adjacent_batch(256);
  sequence->extend(Tokens(1), {});
  batch->step(Tokens(1), {});

  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) _exit(kSkipped);
  for (int i = 1; i < n; ++i) {
    sequence->extend(Tokens(1), {});
    batch->step(Tokens(1), {});
  }
  for (;;) syscall(SYS_exit, sequence->length() == Tokens(n) ? 0 : 1);
}

int status_of_child(int n) {
  const pid_t child = fork();
  if (child == 0) grow_in_strict_mode(n);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) {
    std::perror("fork");
    _exit(1);
  }
  return status;
}

}  // namespace

int main() {
  const int within = status_of_child(kTokensPerPage);
  if (WIFEXITED(within) && WEXITSTATUS(within) == kSkipped) return kSkipped;
  const int across = status_of_child(kTokensPerPage + 1);
  std::printf("within a page: status %#x, across: %#x\n", within, across);
  return WIFEXITED(within) && WEXITSTATUS(within) == 0 && WIFSIGNALED(across) ? 0 : 1;
}
