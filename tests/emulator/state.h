// The whole of the emulated driver: one object of the process, one mutex. An emulator need not be
// fast on many cores; it must be plainly right.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>

#include "calls.h"
#include "capture.h"
#include "clock.h"
#include "memory.h"
#include "options.h"
#include "report.h"
#include "streams.h"

namespace emulator {

constexpr int kMostDevices = 16;

struct State {
  std::mutex mutex;
  std::condition_variable changed;  // operations, holds, shutdown

  Options options;
  Report report;
  Calls calls;
  Clock clock;
  Memory memory{options};
  Streams streams{*this};
  Capture capture;
  std::array<Context, kMostDevices> contexts;  // the primary ones, by device
  std::deque<Context> created_contexts;  // by cuCtxCreate; destroyed ones stay, without references
  bool initialised = false;
  unsigned generation = 0;  // of resets
  std::string last_error;
  std::array<std::size_t, 3> reported_leaks{};  // handles, mappings, reservations: once each
  std::atomic<bool> forked{false};              // this is the child of a fork(2): nothing works

  State();
  void reset(Options chosen);  // wants an empty ledger
  bool ledger_empty();
  Context* context_of(CUcontext handle);  // nullptr: there never was one
  // A violation for each kind of thing that is still there. context: only what it owns.
  void report_leaks(const char* when, Context* context);
};

State& state();
bool& in_host_function();  // of the calling thread

// The calling thread's current contexts.
Context* current_context();  // nullptr: none, or it was destroyed
bool current_destroyed();
void set_current(Context* context);
void push_current(Context* context);
bool pop_current(Context** popped);

}  // namespace emulator
