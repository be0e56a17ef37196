// Timing, and printing what was measured as JSON lines (the format that bench/cpp_programs.py
// reads).
#pragma once

#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

namespace kvspan::bench {

// Seconds that f() takes.
template <class F>
double timed(F f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

inline void print_samples(const std::string& name, const std::vector<double>& samples,
                          const char* unit = "s") {
  std::printf("{\"name\": \"%s\", \"unit\": \"%s\", \"samples\": [", name.c_str(), unit);
  for (std::size_t i = 0; i < samples.size(); ++i) {
    std::printf("%s%.9g", i == 0 ? "" : ", ", samples[i]);
  }
  std::printf("]}\n");
}

}  // namespace kvspan::bench
