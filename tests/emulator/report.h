// Violations: what the client did that a driver leaves undefined. Each is printed at once, kept for
// the tests, and makes the process exit with status 86 unless it was expected or cleared.
// Guarded by State::mutex.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace emulator {

class Report {
 public:
  void reset(const std::vector<std::string>& expect);
  void violation(const std::string& text);
  void expect(const char* substring);  // nullptr: nothing is expected any more
  void clear() { unexpected_.clear(); }

  const std::vector<std::string>& unexpected() const { return unexpected_; }
  std::size_t expected() const { return n_expected_; }

 private:
  std::vector<std::string> expect_;
  std::vector<std::string> unexpected_;
  std::size_t n_expected_ = 0;
};

// printf into a string.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
