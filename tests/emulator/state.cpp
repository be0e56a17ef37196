#include "state.h"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace emulator {
namespace {

struct ThreadContexts {
  unsigned generation = 0;
  std::vector<Context*> stack;
};
ThreadContexts& mine() {
  thread_local ThreadContexts contexts;
  if (contexts.generation != state().generation) contexts = {state().generation, {}};
  return contexts;
}

// One memfd stands behind each exportable handle: take as many descriptors as the system allows.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

State::State() {
  const char* environment = std::getenv("KVSPAN_EMULATOR");
  Options chosen;
  try {
    if (environment != nullptr) chosen = Options::parse(environment);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "kvspan emulator: KVSPAN_EMULATOR: %s\n", error.what());
    std::_Exit(86);  // a client must not run under options other than those it was given
  }
  reset(std::move(chosen));
  ::pthread_atfork(nullptr, nullptr, [] { state().forked = true; });
}

void State::reset(Options chosen) {
  options = std::move(chosen);
  report.reset(options.expect);
  calls.reset(options.log_entries);
  clock.reset(options);
  memory.reset();
  streams.hold(options.hold);
  for (int device = 0; device < kMostDevices; ++device)
    contexts[static_cast<std::size_t>(device)] = {device, 0, 0};
  created_contexts.clear();
  capture = {};
  initialised = false;
  ++generation;
  reported_leaks = {};
  if (!options.memory_free) raise_descriptor_limit();
}

Context* State::context_of(CUcontext handle) {
  for (auto& context : contexts) {
    if (reinterpret_cast<CUcontext>(&context) == handle) return &context;
  }
  for (auto& context : created_contexts) {
    if (reinterpret_cast<CUcontext>(&context) == handle) return &context;
  }
  return nullptr;
}

bool State::ledger_empty() {
  bool active = false;
  for (const auto& context : contexts) active |= context.references > 0;
  for (const auto& context : created_contexts) active |= context.references > 0;
  return !active && memory.reservations.empty() && memory.handles.empty() &&
         memory.mappings.empty() && memory.allocations.empty() && memory.pinned.empty() &&
         streams.created_streams() == 0 && streams.created_events() == 0;
}

void State::report_leaks(const char* when, Context* context) {
  const auto leak = [&](std::size_t n, const char* what) {
    if (n > 0) report.violation(text("leak: %zu %s left %s", n, what, when));
  };
  // Virtual memory belongs to no context. At the end of one, what lies on its device is a leak; it
  // is reported once, not again at exit.
  const auto leak_once = [&](std::size_t kind, std::size_t n, const char* what) {
    if (n > reported_leaks[kind]) leak(n - reported_leaks[kind], what);
    reported_leaks[kind] = std::max(reported_leaks[kind], n);
  };
  std::size_t handles = 0;
  for (const auto& [id, handle] : memory.handles)
    handles += context == nullptr || handle.device == context->device;
  std::size_t mappings = 0;
  for (const auto& [at, mapping] : memory.mappings)
    mappings += context == nullptr || mapping.device == context->device;
  bool other_context = false;
  for (const auto& other : contexts) other_context |= other.references > 0;
  leak_once(0, handles, "physical handles");
  leak_once(1, mappings, "mappings");
  if (!other_context || context == nullptr)
    leak_once(2, memory.reservations.size(), "address reservations");
  std::size_t allocations = 0;
  for (const auto& [at, mapping] : memory.allocations)
    allocations += context == nullptr || mapping.device == context->device;
  leak(allocations, "device allocations (cuMemAlloc)");
  std::size_t pinned = 0;
  for (const auto& [at, entry] : memory.pinned)
    pinned += context == nullptr || entry.device == context->device;
  leak(pinned, "pinned host allocations");
  leak(streams.created_streams(context), "streams");
  leak(streams.created_events(context), "events");
  if (context == nullptr) {
    std::size_t active = 0;
    for (const auto& other : contexts) active += other.references > 0;
    leak(active, "retained primary contexts");
    active = 0;
    for (const auto& other : created_contexts) active += other.references > 0;
    leak(active, "created contexts");
  }
}

State& state() {
  static State* const only = new State();  // never destroyed: threads may call until the very end
  return *only;
}

bool& in_host_function() {
  thread_local bool inside = false;
  return inside;
}

Context* current_context() {
  auto& stack = mine().stack;
  if (stack.empty() || stack.back() == nullptr || stack.back()->references == 0) return nullptr;
  return stack.back();
}

bool current_destroyed() {
  auto& stack = mine().stack;
  return !stack.empty() && stack.back() != nullptr && stack.back()->references == 0;
}

void set_current(Context* context) {
  auto& stack = mine().stack;
  if (!stack.empty()) stack.pop_back();
  if (context != nullptr) stack.push_back(context);
}

void push_current(Context* context) { mine().stack.push_back(context); }

bool pop_current(Context** popped) {
  auto& stack = mine().stack;
  if (stack.empty()) return false;
  *popped = stack.back();
  stack.pop_back();
  return true;
}

}  // namespace emulator
