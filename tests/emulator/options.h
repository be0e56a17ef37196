// What a test asks of the emulator: the text "devices=2,memory=8GiB,..." of KVSPAN_EMULATOR or of
// kvspan_emulator_reset, parsed. README.md has the table. An unknown option is an error, never
// ignored: a test that misspells one would otherwise test nothing.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Options {
  int devices = 1;
  std::size_t memory_bytes = std::size_t{8} << 30;  // of each device
  std::size_t granularity_bytes = std::size_t{2} << 20;
  std::size_t recommended_bytes = std::size_t{2} << 20;
  int driver = 13000;
  bool visible = false;       // granted pages are accessible to the host at the device address
  bool memory_free = false;   // no memory at all: addresses are fictitious, copies move nothing
  bool virtual_time = false;  // operations finish by the virtual clock, not by worker threads
  bool eager = false;         // copies and fills are done when their call returns
  bool garbage = false;       // new memory holds anything but zeros
  bool peers = true;
  bool vmm_context = true;  // create, map, unmap and set-access want a current context
  bool misuse_is_violation = false;
  bool hold = false;
  unsigned long long patience = 0;  // queries of held work until it runs after all; 0: for ever

  // Quirks: measured on single drivers, not documented. 0 or false: the quirk is off.
  std::size_t max_mappings = 516'000;
  std::size_t max_aliases = 5'600;
  bool remap_faults = true;
  bool context_lock = true;

  std::size_t log_entries = 4096;
  std::string log_path;
  std::vector<std::string> expect;
  std::set<std::string, std::less<>> missing;
  std::set<std::string, std::less<>> unlocked;  // calls that do not take the context's lock
  std::map<std::string, double, std::less<>> latency_us;  // overrides by call name
  double device_bytes_per_us = 1.5e6;                     // copies and fills inside the device
  double host_bytes_per_us = 25e3;                        // copies between host and device

  // Throws std::invalid_argument with a text that names the option.
  static Options parse(std::string_view text);
};

}  // namespace emulator
