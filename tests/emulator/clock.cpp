#include "clock.h"

#include <algorithm>
#include <array>

#include "options.h"

namespace emulator {
namespace {

struct Latency {
  std::string_view call;
  double us;
  bool takes_lock;
};

// Published for an A100 at 2 MiB a handle (kvcached bench_vmm; vAttention, table 3): create, map,
// set-access, unmap. All others are ASSUMPTIONS of the right order of magnitude: nobody measured
// them for this project.
constexpr std::array kLatencies = {
    Latency{"cuMemCreate", 193, true},                    // per handle
    Latency{"cuMemMap", 1.75, true},                      // published: 1.5 to 2
    Latency{"cuMemSetAccess", 36, true},                  // per handle in the range
    Latency{"cuMemUnmap", 26, true},                      // per handle in the range
    Latency{"cuMemRelease", 2, true},                     // assumption
    Latency{"cuMemAddressReserve", 5, true},              // assumption
    Latency{"cuMemAddressFree", 5, true},                 // assumption
    Latency{"cuMemImportFromShareableHandle", 20, true},  // assumption
    Latency{"cuMemExportToShareableHandle", 5, true},     // assumption
    Latency{"cuLaunchKernel", 4, true},                   // assumption; also the control kernels
    Latency{"cuLaunchHostFunc", 4, true},                 // assumption
    Latency{"cuMemcpy", 6, true},                // assumption; the wait for the copy comes on top
    Latency{"cuMemcpyHtoD", 6, true},            // assumption
    Latency{"cuMemcpyDtoH", 6, true},            // assumption
    Latency{"cuMemcpyDtoD", 6, true},            // assumption
    Latency{"cuMemcpyAsync", 3, true},           // assumption
    Latency{"cuMemcpyHtoDAsync", 3, true},       // assumption
    Latency{"cuMemcpyDtoHAsync", 3, true},       // assumption
    Latency{"cuMemcpyDtoDAsync", 3, true},       // assumption
    Latency{"cuMemsetD8", 4, true},              // assumption
    Latency{"cuMemsetD16", 4, true},             // assumption
    Latency{"cuMemsetD32", 4, true},             // assumption
    Latency{"cuMemsetD8Async", 3, true},         // assumption
    Latency{"cuMemsetD16Async", 3, true},        // assumption
    Latency{"cuMemsetD32Async", 3, true},        // assumption
    Latency{"cuEventRecord", 1, true},           // assumption
    Latency{"cuEventRecordWithFlags", 1, true},  // assumption
    Latency{"cuStreamWaitEvent", 1, true},       // assumption
    Latency{"cuEventQuery", 0.5, false},         // assumption
    Latency{"cuStreamQuery", 0.5, false},        // assumption
    Latency{"cuEventSynchronize", 2, false},     // assumption; the wait comes on top
    Latency{"cuStreamSynchronize", 2, false},    // assumption; the wait comes on top
    Latency{"cuCtxSynchronize", 2, false},       // assumption; the wait comes on top
    Latency{"cuEventCreate", 1, false},          // assumption
    Latency{"cuEventDestroy", 1, false},         // assumption
    Latency{"cuStreamCreate", 20, true},         // assumption
    Latency{"cuStreamCreateWithPriority", 20, true},   // assumption
    Latency{"cuStreamDestroy", 10, true},              // assumption
    Latency{"cuMemAlloc", 50, true},                   // assumption
    Latency{"cuMemFree", 50, true},                    // assumption
    Latency{"cuMemHostAlloc", 100, true},              // assumption
    Latency{"cuMemAllocHost", 100, true},              // assumption
    Latency{"cuMemFreeHost", 50, true},                // assumption
    Latency{"cuMemHostRegister", 100, true},           // assumption
    Latency{"cuMemHostUnregister", 50, true},          // assumption
    Latency{"cuDevicePrimaryCtxRetain", 1000, false},  // assumption
};
constexpr double kOthersUs = 0.2;  // assumption: attribute queries, current context and the like

constexpr std::size_t kMostBooked = 4096;  // intervals kept of one lock

const Latency* find(std::string_view call) {
  const auto* at = std::find_if(kLatencies.begin(), kLatencies.end(),
                                [&](const Latency& latency) { return latency.call == call; });
  return at == kLatencies.end() ? nullptr : at;
}

// The calling thread's lanes. The generation tells a lane of before a reset from one of after it.
struct Position {
  unsigned generation = 0;
  int own = -1;
  int chosen = -1;
};
thread_local Position position;

}  // namespace

bool has_default_latency(std::string_view call) { return find(call) != nullptr; }

void Clock::reset(const Options& options) {
  options_ = &options;
  ++generation_;
  next_own_ = 1000;
  lanes_.clear();
  busy_.clear();
}

int Clock::lane_number() {
  if (position.generation != generation_) position = {generation_, -1, -1};
  if (position.chosen >= 0) return position.chosen;
  if (position.own < 0) {
    position.own = next_own_++;
    double latest = 0;
    for (const auto& [number, lane] : lanes_) latest = std::max(latest, lane.now_us);
    lanes_[position.own].now_us = latest;
  }
  return position.own;
}

Lane& Clock::lane() { return lanes_[lane_number()]; }

void Clock::choose_lane(int number) {
  const double now = lane().now_us;
  position.chosen = number;
  if (number >= 0 && lanes_.try_emplace(number).second) lanes_[number].now_us = now;
}

double Clock::earliest() const {
  double earliest = lanes_.empty() ? 0 : lanes_.begin()->second.now_us;
  for (const auto& [number, lane] : lanes_) earliest = std::min(earliest, lane.now_us);
  return earliest;
}

double Clock::book(int lock, double from, double duration) {
  auto& busy = busy_[lock];
  // Nothing that ended before every lane's clock can be met again.
  const double past = earliest();
  while (!busy.empty() && (busy.begin()->second < past || busy.size() > kMostBooked))
    busy.erase(busy.begin());
  double start = from;
  auto next = busy.upper_bound(start);
  if (next != busy.begin()) start = std::max(start, std::prev(next)->second);
  while (next != busy.end() && next->first < start + duration) {
    start = std::max(start, next->second);
    ++next;
  }
  const double end = start + duration;
  // Join with the interval that ends here: a busy stretch is one entry.
  if (next != busy.begin() && std::prev(next)->second == start) {
    std::prev(next)->second = end;
  } else {
    busy[start] = end;
  }
  return start;
}

void Clock::charge(std::string_view call, std::size_t count, int lock) {
  const Latency* known = find(call);
  double each = known != nullptr ? known->us : kOthersUs;
  const auto chosen = options_->latency_us.find(known != nullptr ? call : "others");
  if (chosen != options_->latency_us.end()) each = chosen->second;
  const double duration = each * static_cast<double>(count);
  Lane& mine = lane();
  double start = mine.now_us;
  const bool locks = known != nullptr && known->takes_lock && lock >= 0 && duration > 0 &&
                     options_->context_lock && !options_->unlocked.contains(call);
  if (locks) start = book(lock, start, duration);
  mine.lock_wait_us += start - mine.now_us;
  mine.call_time_us += start + duration - mine.now_us;
  mine.now_us = start + duration;
}

void Clock::wait_until(double us) {
  Lane& mine = lane();
  if (us <= mine.now_us) return;
  mine.sync_wait_us += us - mine.now_us;
  mine.now_us = us;
}

}  // namespace emulator
