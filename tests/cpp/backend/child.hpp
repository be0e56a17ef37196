// Runs part of a test in a child of fork(2): what may kill the process, set its limits, or is about
// forks itself. Boost.Test's checks do not reach across, so a child says what is wrong with
// `expect`.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

namespace kvspan::test {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

struct Expectation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw Expectation(what);
}

// How the child ended: 0 when `body` returned, 1 when it threw (the reason is on stderr), 1000 + n
// when signal n killed it.
template <class Body>
int run_in_child(Body body) {
  std::fflush(nullptr);  // or the child prints it again
  const pid_t pid = fork();
  if (pid < 0) throw std::runtime_error("fork failed");
  if (pid == 0) {
    for (const int signal_number : {SIGSEGV, SIGBUS, SIGABRT, SIGXFSZ, SIGALRM}) {
      std::signal(signal_number, SIG_DFL);  // Boost.Test's and the sanitizers' handlers go
    }
    alarm(60);
    try {
      body();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "in the child: %s\n", e.what());
      _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
  }
  return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

inline constexpr int kTrapped = 1000 + SIGSEGV;

// Whether the message of an exception of type E that `body` throws has `part` in it.
template <class E, class Body>
bool throws_naming(Body body, const std::string& part) {
  try {
    body();
  } catch (const E& e) {
    return std::string(e.what()).find(part) != std::string::npos;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "unexpected: %s\n", e.what());
  }
  return false;
}

}  // namespace kvspan::test
