#include "explorer/explorer.hpp"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <utility>

namespace kvspan_test::explorer {

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
// Of one thread on end, in scenarios that need a few dozen: it would never finish by itself.
constexpr int kMostSteps = 300;

// For each location, the oldest store that may still be read.
using View = std::vector<std::uint32_t>;

std::uint32_t& at(View& view, Location location) {
  if (location >= view.size()) view.resize(location + 1);
  return view[location];
}

void merge(View& view, const View& other) {
  if (other.size() > view.size()) view.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) view[i] = std::max(view[i], other[i]);
}

struct Store {
  Word value;
  View carried;  // what an acquire load of it gets to know
};

struct Thread {
  std::function<void()> body;
  ucontext_t context{};
  View view;
  bool is_new = true, is_done = false;
  int n_steps = 0;  // since another thread had its turn
};

// What a thread did, for who has to understand a fault.
struct Step {
  int thread;
  const char* what;
  Location location;
  Word value;
  std::memory_order order;
  bool is_stale;
};

// The decisions of an execution, which the next one repeats but for the last that it can change.
class Decisions {
 public:
  void rewind() { position_ = 0; }

  int next(int n_options) {
    if (n_options == 1) return 0;
    if (position_ == taken_.size()) taken_.push_back({0, n_options});
    return taken_[position_++].first;
  }

  // Whether there is an execution left.
  bool advance() {
    taken_.resize(position_);
    while (!taken_.empty() && taken_.back().first + 1 == taken_.back().second) taken_.pop_back();
    if (taken_.empty()) return false;
    ++taken_.back().first;
    return true;
  }

 private:
  std::vector<std::pair<int, int>> taken_;  // option, of how many
  std::size_t position_ = 0;
};

const char* name_of(std::memory_order order) {
  switch (order) {
    case std::memory_order_relaxed:
      return "relaxed";
    case std::memory_order_acquire:
      return "acquire";
    case std::memory_order_release:
      return "release";
    case std::memory_order_acq_rel:
      return "acq_rel";
    default:
      return "seq_cst";
  }
}

bool acquires(std::memory_order order) {
  return order != std::memory_order_relaxed && order != std::memory_order_release;
}

bool releases(std::memory_order order) {
  return order == std::memory_order_release || order == std::memory_order_acq_rel ||
         order == std::memory_order_seq_cst;
}

class Execution {
 public:
  using Stacks = std::vector<std::unique_ptr<char[]>>;

  Execution(Decisions& decisions, Stacks& stacks, Bounds bounds,
            const std::optional<Mutant>& mutant, std::set<Site>& sites)
      : decisions_(decisions), stacks_(stacks), bounds_(bounds), mutant_(mutant), sites_(sites) {}

  // Runs the scenario to its end, or to its first fault.
  void run(Scenario scenario) {
    // What comes last is a thread after all others. Resized once: a context may not move.
    scenario.threads.push_back(std::move(scenario.finally));
    threads_.resize(scenario.threads.size());
    while (stacks_.size() < threads_.size()) {
      stacks_.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
    }
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.body = std::move(scenario.threads[i]);
      thread.view = outside_;  // what came before the threads happened before them
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks_[i].get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Execution::enter, 0);
    }
    running_ = decisions_.next(last());
    while (!fault_ && running_ != kOutside) {
      swapcontext(&main_, &threads_[static_cast<std::size_t>(running_)].context);
      if (fault_ || !threads_[static_cast<std::size_t>(running_)].is_done) continue;
      running_ = successor();
    }
  }

  const std::optional<std::string>& fault() const { return fault_; }

  [[noreturn]] void fail(const std::string& what) {
    fault_ = what + "\n";
    for (const Step& step : steps_) *fault_ += describe(step);
    if (running_ == kOutside) throw std::logic_error("before the threads: " + *fault_);
    swapcontext(&threads_[static_cast<std::size_t>(running_)].context, &main_);
    std::abort();  // nobody comes back to a thread of an execution that failed
  }

  Location new_location(Word value) {
    const auto location = static_cast<Location>(stores_.size());
    stores_.push_back({Store{value, {}}});
    sequential_.push_back(0);
    at(view(), location) = 0;
    return location;
  }

  Word load(Location location, std::memory_order order, std::source_location where) {
    order = mutated(Site::Kind::load, order, order, where).success;
    yield();
    std::uint32_t oldest = at(view(), location);
    if (order == std::memory_order_seq_cst) oldest = std::max(oldest, sequential_[location]);
    const auto newest = static_cast<std::uint32_t>(stores_[location].size() - 1);
    std::uint32_t seen = newest;
    if (running_ != kOutside && n_stale_ < bounds_.stale_loads) {
      seen = newest -
             static_cast<std::uint32_t>(decisions_.next(static_cast<int>(newest - oldest + 1)));
      n_stale_ += seen != newest;
    }
    see(location, seen, order);
    note("load", location, stores_[location][seen].value, order, seen != newest);
    return stores_[location][seen].value;
  }

  void store(Location location, Word value, std::memory_order order, std::source_location where) {
    order = mutated(Site::Kind::store, order, order, where).success;
    yield();
    append(location, value, order, {});
    note("store", location, value, order);
  }

  Word exchange(Location location, const std::function<std::optional<Word>(Word)>& change,
                std::memory_order success, std::memory_order failure, std::source_location where) {
    const Mutant as = mutated(Site::Kind::exchange, success, failure, where);
    yield();
    const auto newest = static_cast<std::uint32_t>(stores_[location].size() - 1);
    const Word old = stores_[location][newest].value;
    const std::optional<Word> changed = change(old);
    const std::memory_order order = changed ? as.success : as.failure;
    see(location, newest, order);
    if (changed && as.is_torn) {
      note("load", location, old, order);
      yield();
      append(location, *changed, order, {});
      note("store", location, *changed, order);
      return old;
    }
    // An exchange goes on with the release sequence of the store that it replaces.
    if (changed) append(location, *changed, order, stores_[location][newest].carried);
    note(changed ? "exchange" : "failed exchange", location, changed.value_or(old), order);
    return old;
  }

  std::uint32_t thread_number() const {
    return running_ == kOutside ? 0 : static_cast<std::uint32_t>(running_);
  }

  // Not a preemption: the thread says that it cannot go on by itself.
  void let_others_run() {
    if (running_ == kOutside) return;
    const std::vector<int> others = unfinished(running_);
    if (others.empty()) return;
    switch_to(others[static_cast<std::size_t>(decisions_.next(static_cast<int>(others.size())))]);
  }

  void use(Location location, const std::string& name) {
    yield();
    const auto newest = static_cast<std::uint32_t>(stores_[location].size() - 1);
    if (at(view(), location) != newest) {
      fail("data race: what another thread did with " + name + " need not have happened before");
    }
    stores_[location].push_back({});
    at(view(), location) = newest + 1;
    note("use", location, 0, std::memory_order_relaxed);
  }

 private:
  static constexpr int kOutside = -1;

  static void enter();

  View& view() {
    return running_ == kOutside ? outside_ : threads_[static_cast<std::size_t>(running_)].view;
  }

  void see(Location location, std::uint32_t index, std::memory_order order) {
    at(view(), location) = index;
    if (acquires(order)) merge(view(), stores_[location][index].carried);
    if (order == std::memory_order_seq_cst) {
      sequential_[location] = std::max(sequential_[location], index);
    }
  }

  void append(Location location, Word value, std::memory_order order, View carried) {
    const auto index = static_cast<std::uint32_t>(stores_[location].size());
    at(view(), location) = index;
    if (releases(order)) merge(carried, view());
    if (order == std::memory_order_seq_cst) sequential_[location] = index;
    stores_[location].push_back({value, std::move(carried)});
  }

  // Before an operation: lets another thread go first, or not.
  void yield() {
    if (running_ == kOutside) return;
    Thread& thread = threads_[static_cast<std::size_t>(running_)];
    if (++thread.n_steps > kMostSteps) fail("a thread by itself does not come to an end");
    // Who was chosen just now does something before there is another choice.
    if (std::exchange(thread.is_new, false) || n_preemptions_ == bounds_.preemptions) return;
    const std::vector<int> others = unfinished(running_);
    const int chosen = decisions_.next(static_cast<int>(others.size()) + 1);
    if (chosen == 0) return;
    ++n_preemptions_;
    switch_to(others[static_cast<std::size_t>(chosen) - 1]);
  }

  void switch_to(int other) {
    Thread& me = threads_[static_cast<std::size_t>(running_)];
    me.n_steps = 0;
    running_ = other;
    swapcontext(&me.context, &main_);
  }

  int successor() {
    const std::vector<int> left = unfinished(running_);
    if (left.empty()) return begin_last();
    return left[static_cast<std::size_t>(decisions_.next(static_cast<int>(left.size())))];
  }

  int last() const { return static_cast<int>(threads_.size()) - 1; }

  int begin_last() {
    if (running_ == last()) return kOutside;
    for (const Thread& thread : threads_) merge(threads_.back().view, thread.view);
    return last();
  }

  std::vector<int> unfinished(int but) const {
    std::vector<int> found;
    for (int i = 0; i < last(); ++i) {
      if (i != but && !threads_[static_cast<std::size_t>(i)].is_done) found.push_back(i);
    }
    return found;
  }

  // The operation as it is to be done.
  Mutant mutated(Site::Kind kind, std::memory_order success, std::memory_order failure,
                 std::source_location where) {
    const Site site{where.file_name(), where.line(), where.column(), kind, success, failure};
    if (mutant_ && mutant_->site == site) return *mutant_;
    if (running_ != kOutside && running_ != last()) sites_.insert(site);
    return {site, success, failure};
  }

  void note(const char* what, Location location, Word value, std::memory_order order,
            bool is_stale = false) {
    if (running_ != kOutside) steps_.push_back({running_, what, location, value, order, is_stale});
  }

  static std::string describe(const Step& step) {
    return "  thread " + std::to_string(step.thread) + ": " + step.what + " of location " +
           std::to_string(step.location) + ", " + std::to_string(step.value) + ", " +
           name_of(step.order) + (step.is_stale ? ", not the last value\n" : "\n");
  }

  Decisions& decisions_;
  Stacks& stacks_;
  const Bounds bounds_;
  const std::optional<Mutant>& mutant_;
  std::set<Site>& sites_;
  std::vector<std::vector<Store>> stores_;  // by location, in modification order
  View sequential_;  // the last store that a sequentially consistent operation made or saw
  View outside_;     // of what is done before and after the threads
  std::vector<Thread> threads_;
  ucontext_t main_{};
  int running_ = kOutside;
  int n_preemptions_ = 0, n_stale_ = 0;
  std::vector<Step> steps_;
  std::optional<std::string> fault_;
};

Execution* current = nullptr;

void Execution::enter() {
  Thread& thread = current->threads_[static_cast<std::size_t>(current->running_)];
  thread.body();
  thread.is_done = true;
  swapcontext(&thread.context, &current->main_);
}

// The next weaker orders.
std::vector<std::memory_order> weaker(Site::Kind kind, std::memory_order order) {
  switch (order) {
    case std::memory_order_relaxed:
      return {};
    case std::memory_order_acq_rel:
      return {std::memory_order_acquire, std::memory_order_release};
    case std::memory_order_seq_cst:
      if (kind == Site::Kind::load) return {std::memory_order_acquire};
      if (kind == Site::Kind::store) return {std::memory_order_release};
      return {std::memory_order_acq_rel};
    default:
      return {std::memory_order_relaxed};
  }
}

}  // namespace

std::vector<Mutant> mutants_of(const Site& site) {
  std::vector<Mutant> mutants;
  const bool has_failure = site.failure != site.success;
  for (const std::memory_order order : weaker(site.kind, site.success)) {
    mutants.push_back({site, order, has_failure ? site.failure : order});
  }
  if (has_failure) {
    for (const std::memory_order order : weaker(Site::Kind::load, site.failure)) {
      mutants.push_back({site, site.success, order});
    }
  }
  if (site.kind == Site::Kind::exchange) {
    mutants.push_back({site, site.success, site.failure, true});
  }
  return mutants;
}

std::string describe(const Mutant& mutant) {
  const auto& [site, success, failure, is_torn] = mutant;
  std::string what = std::string(site.file.substr(site.file.rfind('/') + 1)) + ":" +
                     std::to_string(site.line) + ":" + std::to_string(site.column) + ": ";
  if (is_torn) return what + "torn";
  const bool is_failure = success == site.success;
  return what + name_of(is_failure ? site.failure : site.success) + " weakened to " +
         name_of(is_failure ? failure : success);
}

Outcome explore(const std::function<Scenario()>& make, Bounds bounds,
                const std::optional<Mutant>& mutant) {
  Outcome outcome;
  Decisions decisions;
  Execution::Stacks stacks;
  do {
    decisions.rewind();
    Execution execution(decisions, stacks, bounds, mutant, outcome.sites);
    current = &execution;
    execution.run(make());
    ++outcome.n_executions;
    outcome.fault = execution.fault();
  } while (!outcome.fault && outcome.n_executions < bounds.executions && decisions.advance());
  current = nullptr;
  return outcome;
}

void require(bool holds, const std::string& what) {
  if (!holds) current->fail(what);
}

Memory::Memory(std::string name) : location_(current->new_location(0)), name_(std::move(name)) {}

void Memory::use() { current->use(location_, name_); }

std::uint32_t thread_number() { return current->thread_number(); }

void let_others_run() { current->let_others_run(); }

Location new_location(Word value) { return current->new_location(value); }

Word load(Location location, std::memory_order order, std::source_location where) {
  return current->load(location, order, where);
}

void store(Location location, Word value, std::memory_order order, std::source_location where) {
  current->store(location, value, order, where);
}

Word exchange(Location location, const std::function<std::optional<Word>(Word)>& change,
              std::memory_order success, std::memory_order failure, std::source_location where) {
  return current->exchange(location, change, success, failure, where);
}

}  // namespace kvspan_test::explorer
