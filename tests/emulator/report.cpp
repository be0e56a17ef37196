#include "report.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace emulator {

void Report::reset(const std::vector<std::string>& expect) {
  expect_ = expect;
  unexpected_.clear();
  n_expected_ = 0;
}

void Report::violation(const std::string& what) {
  const bool expected = std::any_of(expect_.begin(), expect_.end(), [&](const std::string& part) {
    return what.find(part) != std::string::npos;
  });
  std::fprintf(stderr, "kvspan emulator: VIOLATION%s: %s\n", expected ? " (expected)" : "",
               what.c_str());
  if (expected) {
    ++n_expected_;
  } else {
    unexpected_.push_back(what);
  }
}

void Report::expect(const char* substring) {
  if (substring == nullptr) {
    expect_.clear();
  } else {
    expect_.emplace_back(substring);
  }
}

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace emulator
