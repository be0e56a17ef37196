#include "calls.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "report.h"

namespace emulator {
namespace {

constexpr std::array<std::string_view, 5> kNeverFail = {
    "cuGetErrorName", "cuGetErrorString", "cuGetProcAddress", "cuDriverGetVersion", "cuInit"};

int thread_number() {
  thread_local const int number = static_cast<int>(::syscall(SYS_gettid));
  return number;
}

}  // namespace

void Calls::reset(std::size_t log_entries) {
  *this = Calls();
  log_entries_ = log_entries;
}

void Calls::fail(const char* names, std::size_t n, CUresult result, std::size_t times) {
  if (names == nullptr) {
    faults_.clear();
    return;
  }
  Fault fault{{}, n > 0 ? n - 1 : 0, times, result};
  std::string_view rest = names;
  while (!rest.empty() && rest != "*") {
    const auto end = std::min(rest.find(','), rest.size());
    std::string_view name = rest.substr(0, end);
    while (name.starts_with(' ')) name.remove_prefix(1);
    fault.names.emplace_back(name);
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  if (times > 0) faults_.push_back(std::move(fault));
}

std::optional<CUresult> Calls::fault(std::string_view name) {
  std::optional<CUresult> result;
  for (auto& fault : faults_) {
    const bool any = fault.names.empty() &&
                     std::find(kNeverFail.begin(), kNeverFail.end(), name) == kNeverFail.end();
    if (!any && std::find(fault.names.begin(), fault.names.end(), name) == fault.names.end())
      continue;
    if (fault.skip > 0) {
      --fault.skip;
    } else if (!result && fault.times > 0) {
      --fault.times;
      ++injected_;
      result = fault.result;
    }
  }
  std::erase_if(faults_, [](const Fault& fault) { return fault.times == 0; });
  return result;
}

void Calls::began(std::string_view name) {
  ++counts_[name].calls;
  ++total_;
}

void Calls::ended(std::string_view name, std::size_t handles, CUresult result, int lane,
                  double now_us, std::initializer_list<std::uint64_t> arguments) {
  counts_[name].handles += handles;
  if (result != CUDA_SUCCESS && result != CUDA_ERROR_NOT_READY) ++failed_;
  if (log_entries_ == 0) return;
  if (log_.size() >= log_entries_) log_.pop_front();
  Entry& entry = log_.emplace_back();
  entry.name = name;
  entry.n_arguments =
      static_cast<unsigned char>(std::min(arguments.size(), entry.arguments.size()));
  std::copy_n(arguments.begin(), entry.n_arguments, entry.arguments.begin());
  entry.result = result;
  entry.thread = thread_number();
  entry.lane = lane;
  entry.now_us = now_us;
}

Calls::Count Calls::count(std::string_view name) const {
  const auto at = counts_.find(name);
  return at == counts_.end() ? Count{} : at->second;
}

std::string Calls::log() const {
  std::string out;
  for (const auto& entry : log_) {
    out += text("[%d lane %d %.2f us] %.*s(", entry.thread, entry.lane, entry.now_us,
                static_cast<int>(entry.name.size()), entry.name.data());
    for (unsigned i = 0; i < entry.n_arguments; ++i) {
      const auto argument = static_cast<unsigned long long>(entry.arguments[i]);
      out += text(argument < (1ULL << 32) ? "%s%llu" : "%s0x%llx", i == 0 ? "" : ", ", argument);
    }
    const char* name = error_name(entry.result);
    out += text(") = %s\n", name != nullptr ? name : "an unknown error");
  }
  return out;
}

}  // namespace emulator
