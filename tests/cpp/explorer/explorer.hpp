// Runs small concurrent scenarios in every order that the C++ memory model allows, on one thread.
//
// The code under test uses the atomics of atomics.hpp. Each of their operations comes here, where
// it is decided which thread goes on, and which of the values that it may see a load sees; all
// combinations of decisions are tried, one execution after the other, depth first.
//
// The model is that of views. Every store to a location has a place in its modification order, and
// every thread a view: for each location the oldest store that it may still read. A release store
// carries its thread's view, an acquire load of it (or of an exchange that followed it) merges that
// into its own, and a sequentially consistent load sees no less than what sequentially consistent
// operations before it saw or stored there. Left out is what only processors do that reorder a
// thread's stores: here they happen in the program's order, each the last of its location so far.
// And a failed exchange sees the last value, and never fails without cause.
//
// Sources: Kang et al., "A promising semantics for relaxed-memory concurrency", POPL 2017 (views);
// Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007 (bounds).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

namespace kvspan_test::explorer {

using Word = std::uint64_t;
using Location = std::uint32_t;

// One execution: what its threads do, and what must hold when all are done. Made anew for each.
struct Scenario {
  std::vector<std::function<void()>> threads;
  std::function<void()> finally = [] {};
};

struct Bounds {
  static constexpr int kAll = std::numeric_limits<int>::max();
  int preemptions = kAll;  // of a thread that could have gone on
  int stale_loads = kAll;  // that see another value than the last
  int executions = kAll;   // before it ends, with nothing found
};

// An atomic operation in the source code, and the memory orders that it asks for.
struct Site {
  enum class Kind { load, store, exchange };

  std::string_view file;
  std::uint32_t line = 0, column = 0;
  Kind kind = Kind::load;
  std::memory_order success = {}, failure = {};  // equal but for a compare-exchange

  auto operator<=>(const Site&) const = default;
};

// A fault put in on purpose: the site's operations have these memory orders. An exchange that is
// torn is a load, and a store that other threads may come before.
struct Mutant {
  Site site;
  std::memory_order success, failure;
  bool is_torn = false;
};
std::vector<Mutant> mutants_of(const Site& site);
std::string describe(const Mutant& mutant);

struct Outcome {
  int n_executions = 0;
  // What went wrong in the first execution that did, and its operations in order.
  std::optional<std::string> fault;
  // What the threads have executed.
  std::set<Site> sites;
};

Outcome explore(const std::function<Scenario()>& make, Bounds bounds = {},
                const std::optional<Mutant>& mutant = {});

// In a thread of a scenario, or at its end: ends the execution, which has failed, unless `holds`.
void require(bool holds, const std::string& what);

// Ordinary memory that only one thread may use at a time. `use` fails where the last use by another
// thread need not have happened before: a data race.
class Memory {
 public:
  explicit Memory(std::string name);
  void use();

 private:
  Location location_;
  std::string name_;
};

// ---- what atomics.hpp is made of ----

Location new_location(Word value);
Word load(Location, std::memory_order, std::source_location);
void store(Location, Word, std::memory_order, std::source_location);
// Replaces the value by `change` of it and returns the old one; no change, no store.
Word exchange(Location, const std::function<std::optional<Word>(Word)>& change,
              std::memory_order success, std::memory_order failure, std::source_location);

// The number of the thread that runs, from 0 on; 0 outside of threads.
std::uint32_t thread_number();

// Another thread goes on, if one is left.
void let_others_run();

}  // namespace kvspan_test::explorer
