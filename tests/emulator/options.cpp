#include "options.h"

#include <charconv>
#include <functional>
#include <stdexcept>

#include "clock.h"

namespace emulator {
namespace {

[[noreturn]] void refuse(std::string_view option, std::string_view why) {
  throw std::invalid_argument("option \"" + std::string(option) + "\": " + std::string(why));
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const auto end = text.find(separator);
    if (end != 0) parts.emplace_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return parts;
}

unsigned long long to_count(std::string_view option, std::string_view value) {
  unsigned long long count = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  if (error != std::errc{}) refuse(option, "a number is wanted");
  const std::string_view unit(end, static_cast<std::size_t>(value.data() + value.size() - end));
  if (unit.empty() || unit == "B") return count;
  if (unit == "KiB") return count << 10;
  if (unit == "MiB") return count << 20;
  if (unit == "GiB") return count << 30;
  if (unit == "TiB") return count << 40;
  refuse(option, "the unit is not one of B, KiB, MiB, GiB, TiB");
}

double to_number(std::string_view option, const std::string& value) {
  std::size_t used = 0;
  double number = -1;
  try {
    number = std::stod(value, &used);
  } catch (const std::exception&) {
    refuse(option, "a number is wanted");
  }
  if (used != value.size() || !(number >= 0)) refuse(option, "a number of at least 0 is wanted");
  return number;
}

bool to_flag(std::string_view option, std::string_view value) {
  if (value == "1") return true;
  if (value == "0") return false;
  refuse(option, "0 or 1 is wanted");
}

}  // namespace

Options Options::parse(std::string_view text) {
  Options options;
  bool time_chosen = false;
  using Setter = std::function<void(std::string_view, const std::string&)>;
  const auto flag = [](bool& target) -> Setter {
    return [&target](std::string_view o, const std::string& v) { target = to_flag(o, v); };
  };
  const auto count = [](std::size_t& target) -> Setter {
    return [&target](std::string_view o, const std::string& v) { target = to_count(o, v); };
  };
  const auto names = [](std::set<std::string, std::less<>>& target) -> Setter {
    return [&target](std::string_view, const std::string& v) {
      for (auto& name : split(v, ':')) target.insert(std::move(name));
    };
  };
  const std::map<std::string, Setter, std::less<>> setters = {
      {"devices",
       [&](std::string_view o, const std::string& v) {
         const auto n = to_count(o, v);
         if (n > 16) refuse(o, "at most 16 devices");
         options.devices = static_cast<int>(n);
       }},
      {"driver", [&](std::string_view o,
                     const std::string& v) { options.driver = static_cast<int>(to_count(o, v)); }},
      {"time",
       [&](std::string_view o, const std::string& v) {
         if (v != "real" && v != "virtual") refuse(o, "real or virtual is wanted");
         options.virtual_time = v == "virtual";
         time_chosen = true;
       }},
      {"misuse",
       [&](std::string_view o, const std::string& v) {
         if (v != "error" && v != "violation") refuse(o, "error or violation is wanted");
         options.misuse_is_violation = v == "violation";
       }},
      {"quirks",
       [&](std::string_view o, const std::string& v) {
         if (to_flag(o, v)) return;
         options.max_mappings = options.max_aliases = 0;
         options.remap_faults = options.context_lock = false;
       }},
      {"expect",
       [&](std::string_view, const std::string& v) {
         for (auto& part : split(v, ':')) options.expect.push_back(std::move(part));
       }},
      {"log", [&](std::string_view, const std::string& v) { options.log_path = v; }},
      {"patience",
       [&](std::string_view o, const std::string& v) { options.patience = to_count(o, v); }},
      {"rate.device",
       [&](std::string_view o, const std::string& v) {
         options.device_bytes_per_us = to_number(o, v) / 1e6;
       }},
      {"rate.host",
       [&](std::string_view o, const std::string& v) {
         options.host_bytes_per_us = to_number(o, v) / 1e6;
       }},
      {"memory", count(options.memory_bytes)},
      {"granularity", count(options.granularity_bytes)},
      {"recommended", count(options.recommended_bytes)},
      {"max_mappings", count(options.max_mappings)},
      {"max_aliases", count(options.max_aliases)},
      {"log_entries", count(options.log_entries)},
      {"visible", flag(options.visible)},
      {"eager", flag(options.eager)},
      {"garbage", flag(options.garbage)},
      {"memory_free", flag(options.memory_free)},
      {"peers", flag(options.peers)},
      {"vmm_context", flag(options.vmm_context)},
      {"hold", flag(options.hold)},
      {"remap_faults", flag(options.remap_faults)},
      {"context_lock", flag(options.context_lock)},
      {"missing", names(options.missing)},
      {"unlocked", names(options.unlocked)},
  };
  for (const auto& part : split(text, ',')) {
    const auto equals = part.find('=');
    if (equals == std::string::npos) refuse(part, "name=value is wanted");
    const std::string name = part.substr(0, equals);
    const std::string value = part.substr(equals + 1);
    constexpr std::string_view latency = "latency.";
    if (name.starts_with(latency)) {
      const std::string call = name.substr(latency.size());
      if (call != "others" && !has_default_latency(call)) refuse(name, "no such call");
      options.latency_us[call] = to_number(name, value);
      continue;
    }
    const auto setter = setters.find(name);
    if (setter == setters.end()) refuse(name, "there is no such option");
    setter->second(name, value);
  }
  const auto power_of_two = [](std::size_t n) { return n != 0 && (n & (n - 1)) == 0; };
  if (!power_of_two(options.granularity_bytes) || options.granularity_bytes < 4096)
    refuse("granularity", "a power of two of at least 4 KiB is wanted");
  if (options.recommended_bytes < options.granularity_bytes)
    options.recommended_bytes = options.granularity_bytes;
  if (options.recommended_bytes % options.granularity_bytes != 0)
    refuse("recommended", "a multiple of the granularity is wanted");
  if (options.device_bytes_per_us <= 0 || options.host_bytes_per_us <= 0)
    refuse("rate", "more than 0 is wanted");
  if (options.memory_free && !time_chosen) options.virtual_time = true;
  if (options.memory_free && options.visible)
    refuse("visible", "there is no memory to see with memory_free=1");
  return options;
}

}  // namespace emulator
