// What was called: counts by name, a bounded log of the last calls, and the faults that a test has
// injected. Guarded by State::mutex.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_api.h"

namespace emulator {

class Calls {
 public:
  struct Count {
    std::size_t calls = 0;
    std::size_t handles = 0;
  };

  void reset(std::size_t log_entries);
  void fail(const char* names, std::size_t n, CUresult result, std::size_t times);

  // The result that an injected fault gives this call, if one does.
  std::optional<CUresult> fault(std::string_view name);
  void began(std::string_view name);
  void ended(std::string_view name, std::size_t handles, CUresult result, int lane, double now_us,
             std::initializer_list<std::uint64_t> arguments);

  Count count(std::string_view name) const;
  std::size_t total() const { return total_; }
  std::size_t failed() const { return failed_; }
  std::size_t injected() const { return injected_; }
  std::string log() const;

 private:
  struct Fault {
    std::vector<std::string> names;  // empty: any
    std::size_t skip = 0;
    std::size_t times = 0;
    CUresult result = CUDA_SUCCESS;
  };
  struct Entry {
    std::string_view name;  // always a literal
    std::array<std::uint64_t, 6> arguments{};
    unsigned char n_arguments = 0;
    CUresult result = CUDA_SUCCESS;
    int thread = 0;
    int lane = 0;
    double now_us = 0;
  };

  std::map<std::string_view, Count> counts_;
  std::vector<Fault> faults_;
  std::deque<Entry> log_;
  std::size_t log_entries_ = 0;
  std::size_t total_ = 0;
  std::size_t failed_ = 0;
  std::size_t injected_ = 0;
};

const char* error_name(CUresult error);    // nullptr: no such error
const char* error_string(CUresult error);  // nullptr: no such error

}  // namespace emulator
