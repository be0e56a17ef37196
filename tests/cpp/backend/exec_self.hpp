// Runs a test of this very program in a process of its own, started with exec: for what needs a
// fresh driver, other environment variables, or somebody to share memory with. Such tests are
// disabled and run only by name; their arguments come behind `--`.
#pragma once

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <string>
#include <vector>

namespace kvspan::test {

// The descriptor under which the process finds the one that was handed to it.
inline constexpr int kInheritedFd = 100;

// The exit status: 0 when the test passed. `fd` is handed over unless it is -1; `environment`
// ("NAME=value") goes before what this process has.
inline int run_in_new_process(const std::string& test, const std::vector<std::string>& arguments,
                              int fd = -1, const std::vector<std::string>& environment = {}) {
  std::vector<std::string> words = {"kvspan", "--run_test=" + test, "--color_output=no", "--"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv, env;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<std::string> ours = environment;
  for (char** at = environ; *at != nullptr; ++at) {
    const std::string variable = *at;
    const std::string name = variable.substr(0, variable.find('=') + 1);
    bool is_replaced = false;
    for (const std::string& other : environment) is_replaced |= other.starts_with(name);
    if (!is_replaced) ours.push_back(variable);
  }
  for (std::string& variable : ours) env.push_back(variable.data());
  env.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  if (fd >= 0) posix_spawn_file_actions_adddup2(&actions, fd, kInheritedFd);
  pid_t pid = -1;
  const int error = posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), env.data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return -1;
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

// In such a process: the arguments that it was given.
inline std::vector<std::string> process_arguments() {
  const auto& suite = boost::unit_test::framework::master_test_suite();
  return {suite.argv + 1, suite.argv + suite.argc};
}

}  // namespace kvspan::test
