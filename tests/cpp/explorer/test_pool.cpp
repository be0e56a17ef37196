// The pool's operations in every order that the memory model allows: pairs of them without bounds,
// more of them with few preemptions and stale loads. What takers and givers are told must be what
// they could have been told one after the other. Each check is proven by weakening one memory order
// of the pool, which it must find.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "explorer/explorer.hpp"
#include "pool/support.hpp"

using namespace kvspan;
using namespace kvspan_test::explorer;

BOOST_AUTO_TEST_SUITE(explored_pool)

namespace {

constexpr SizeClass kClass{0};

// Frames of a pool and the memory behind them. Whoever takes one uses its memory, and whoever gives
// it back has used it until then.
class Frames {
 public:
  explicit Frames(std::uint32_t n, std::uint32_t lend_from = IdPool::kLendFrom)
      : pool_(Pages(n), kClass, lend_from) {
    for (std::uint32_t i = 0; i < n; ++i) memory_.emplace_back("frame " + std::to_string(i));
  }

  // As many, or none.
  std::vector<FrameId> take(std::size_t n) {
    std::vector<FrameId> frames(n);
    Operation& operation = begin({.taken = n});
    operation.is_refused = !pool_.take(kClass, frames);
    operation.end = ++now_;
    if (operation.is_refused) return {};
    use(frames);
    return frames;
  }

  void give(std::span<const FrameId> frames) {
    use(frames);
    give_unused(frames);
  }
  void give_unused(std::span<const FrameId> frames) {
    Operation& operation = begin({});
    const FramePool::Given given = pool_.give(frames);
    operation.given = given.freed;
    operation.end = ++now_;
    require(given.refused == 0, "a frame in use is refused");
  }

  void use(std::span<const FrameId> frames) {
    for (const FrameId frame : frames) memory_[frame.index()].use();
  }

  // When all is done: so many are in use, all others can be had, and all that happened could have
  // happened one after the other.
  void check(std::size_t n_in_use) {
    require(has_order(memory_.size()), "no order of operations explains what they returned");
    const FramePool::Counts counts = pool_.counts(kClass);
    require(counts.in_use == n_in_use, "another number of frames is in use");
    require(counts.fresh + counts.free + n_in_use == memory_.size(), "frames are lost");
    require(take(memory_.size() - n_in_use).size() == memory_.size() - n_in_use,
            "a free frame cannot be had");
  }

  FramePool& pool() { return pool_; }

 private:
  struct Operation {
    std::size_t taken = 0, given = 0;
    bool is_refused = false;
    int begin = 0, end = 0;
    bool is_placed = false;
  };

  Operation& begin(Operation operation) {
    operation.begin = ++now_;
    return operations_.emplace_back(operation);
  }

  // Whether the operations that have no place yet can follow each other from here on, none before
  // one that had ended when it began (Herlihy and Wing, "Linearizability", TOPLAS 1990).
  bool has_order(std::size_t n_free) {
    int first_end = now_ + 1;
    for (const Operation& o : operations_) {
      if (!o.is_placed) first_end = std::min(first_end, o.end);
    }
    if (first_end > now_) return true;
    for (Operation& o : operations_) {
      if (o.is_placed || o.begin > first_end || o.is_refused != (o.taken > n_free)) continue;
      o.is_placed = true;
      const bool found = has_order(n_free + o.given - (o.is_refused ? 0 : o.taken));
      o.is_placed = false;
      if (found) return true;
    }
    return false;
  }

  FramePool pool_;
  std::vector<Memory> memory_;
  std::deque<Operation> operations_;
  int now_ = 0;
};

Scenario a_frame_changes_hands() {
  const auto frames = std::make_shared<Frames>(1);
  const auto held = frames->take(1);
  const auto taken = std::make_shared<std::size_t>();
  return {{[=] { frames->give(held); }, [=] { *taken = frames->take(1).size(); }},
          [=] { frames->check(*taken); }};
}

// The first of two, held by so many, while the other one is free: no hint changes.
Scenario a_frame_changes_hands_beside_another(int n_holders) {
  const auto frames = std::make_shared<Frames>(2);
  const auto both = frames->take(2);
  const std::vector<FrameId> held{both[0]};
  frames->give(std::span(both).last(1));
  Scenario scenario;
  for (int i = 0; i < n_holders; ++i) {
    if (i > 0) require(frames->pool().share(held) == 0, "a frame in use is refused");
    // One holder at most has used it just now.
    scenario.threads.push_back([=] { i == 0 ? frames->give(held) : frames->give_unused(held); });
  }
  scenario.threads.push_back([=] { require(frames->take(1).size() == 1, "one of two frames"); });
  scenario.finally = [=] { frames->check(1); };
  return scenario;
}
Scenario one_holder() { return a_frame_changes_hands_beside_another(1); }
Scenario two_holders() { return a_frame_changes_hands_beside_another(2); }

// Threads change a tree; none of its ids is hidden then.
Scenario changes_of(const std::shared_ptr<BitmapTree>& tree,
                    std::vector<std::function<void()>> threads) {
  return {std::move(threads), [=] {
            require(PoolTestPeer::hints_are_complete(*tree), "no hint leads to an id that is free");
          }};
}

// One id of the word, and another.
constexpr std::uint32_t kOne = 1, kOther = 2;
// The first word of another word of marks.
constexpr std::uint32_t kFarWord = 64;

Scenario a_word_is_emptied_and_filled() {
  const auto tree = std::make_shared<BitmapTree>(kIdsPerWord);
  tree->set({0, kOne});
  return changes_of(tree, {[=] { tree->claim(0, 1); }, [=] { tree->set({0, kOther}); }});
}
// Two more threads have changed the word before it was lent, and one corrected its hint since.
Scenario a_lent_word_is_unmarked_and_recalled() {
  const auto tree = std::make_shared<BitmapTree>(kIdsPerWord);
  tree->set({0, kOne});
  require(tree->lend({0, kOne}, 0), "nobody else changes the word");
  PoolTestPeer::mark_stale(*tree, 0);
  return changes_of(tree, {[=] { PoolTestPeer::unmark_late(*tree, 0); }, [=] { tree->recall(0); }});
}
Scenario two_words_are_filled() {
  const auto tree = std::make_shared<BitmapTree>(2 * kIdsPerWord);
  return changes_of(tree, {[=] { tree->set({0, kOne}); }, [=] { tree->set({1, kOne}); }});
}
Scenario far_words_are_filled() {
  const auto tree = std::make_shared<BitmapTree>((kFarWord + 1) * kIdsPerWord);
  return changes_of(tree, {[=] { tree->set({0, kOne}); }, [=] { tree->set({kFarWord, kOne}); }});
}
Scenario one_word_is_emptied_and_others_filled() {
  const auto tree = std::make_shared<BitmapTree>((kFarWord + 1) * kIdsPerWord);
  tree->set({0, kOne});
  return changes_of(tree, {[=] { tree->claim(0, 1); }, [=] { tree->set({1, kOne}); },
                           [=] { tree->set({kFarWord, kOne}); }});
}

// All that the pool does at once: one gives, two take, in ones and twos.
Scenario givers_and_takers() {
  const auto frames = std::make_shared<Frames>(3);
  const auto held = frames->take(2);
  const auto taken = std::make_shared<std::vector<std::size_t>>(2);
  const auto take = [=](std::size_t who, std::size_t n) {
    const auto got = frames->take(n);
    if (got.empty() || n == 2) {
      (*taken)[who] = got.size();
    } else {
      frames->give(got);
    }
  };
  return {{[=] {
             frames->give(std::span(held).first(1));
             frames->give(std::span(held).last(1));
           },
           [=] { take(0, 2); }, [=] { take(1, 1); }},
          [=] { frames->check((*taken)[0] + (*taken)[1]); }};
}

// Three frames: one in thread 0's magazine, and two in use.
struct Lent {
  std::shared_ptr<Frames> frames = std::make_shared<Frames>(3, 1);
  std::vector<FrameId> held = frames->take(3);

  Lent() {
    frames->give(std::span(held).first(2));
    held[0] = frames->take(1)[0];
    held.erase(held.begin() + 1);
  }

  // Thread i takes wanted[i] frames, if it gets them, or gives back as many.
  Scenario scenario(const std::vector<int>& wanted) const {
    Scenario scenario;
    const auto n_in_use = std::make_shared<std::size_t>(held.size());
    std::size_t n_given = 0;
    for (const int n : wanted) {
      if (n > 0) {
        scenario.threads.push_back([=, frames = frames] {
          *n_in_use += frames->take(static_cast<std::size_t>(n)).size();
        });
      } else {
        const std::vector<FrameId> given(held.begin() + static_cast<std::ptrdiff_t>(n_given),
                                         held.begin() + static_cast<std::ptrdiff_t>(n_given) - n);
        n_given += given.size();
        scenario.threads.push_back([=, frames = frames] { frames->give(given); });
      }
    }
    scenario.finally = [=, frames = frames] { frames->check(*n_in_use - n_given); };
    return scenario;
  }
};

Scenario both_want_what_is_lent() { return Lent{}.scenario({1, 1}); }
Scenario the_lender_gets_another() { return Lent{}.scenario({1, -1}); }
Scenario a_lent_word_is_given_to_and_recalled() { return Lent{}.scenario({-1, 2}); }
Scenario magazines() { return Lent{}.scenario({1, 2, -2}); }

// A word is lent while an id of it is given back, of which no count tells yet.
Scenario a_word_is_given_to_and_lent() {
  const auto frames = std::make_shared<Frames>(kIdsPerWord + 1, 1);
  const auto held = frames->take(kIdsPerWord + 1);
  frames->give(std::span(held).subspan(1, 1));
  frames->give(std::span(held).last(1));
  return {{[=] { frames->take(1); }, [=] { frames->give(std::span(held).first(1)); }},
          [=] { frames->check(kIdsPerWord - 1); }};
}

// Thread 0's magazine has no id left and gets another word, while all are recalled.
Scenario a_magazine_is_filled_and_recalled() {
  const auto frames = std::make_shared<Frames>(kIdsPerWord + 1, 1);
  const auto held = frames->take(kIdsPerWord + 1);
  frames->give(std::span(held).first(1));
  frames->take(1);
  frames->give(std::span(held).last(1));
  const auto n_taken = std::make_shared<std::size_t>();
  return {{[=] { *n_taken = frames->take(1).size(); }, [=] { frames->take(2); }},
          [=] { frames->check(kIdsPerWord + *n_taken); }};
}

// One recalls what is lent and is refused, so that another one can have it.
Scenario a_recalled_word_is_taken_by_another() { return Lent{}.scenario({3, 2}); }

// Two threads lend words to themselves, of which there is one.
Scenario both_lend() {
  const auto frames = std::make_shared<Frames>(3, 1);
  const auto held = frames->take(3);
  frames->give(held);
  const auto take = [=] { require(frames->take(1).size() == 1, "one of three frames"); };
  return {{take, take}, [=] { frames->check(2); }};
}

// Two words of the tree change in one call, on both sides.
Scenario a_batch_has_two_words() {
  const auto frames = std::make_shared<Frames>(kIdsPerWord + 1);
  auto held = frames->take(kIdsPerWord + 1);
  const std::vector<FrameId> given(held.end() - 2, held.end());
  const auto taken = std::make_shared<std::size_t>();
  return {{[=] { frames->give(given); }, [=] { *taken = frames->take(2).size(); }},
          [=, n_held = held.size() - 2] { frames->check(n_held + *taken); }};
}

// One holder adds a reference for somebody else while another one gives its own back.
Scenario a_shared_frame_is_given() {
  const auto frames = std::make_shared<Frames>(1);
  const auto held = frames->take(1);
  require(frames->pool().share(held) == 0, "a frame in use is refused");
  return {{[=] {
             require(frames->pool().share(held) == 0, "a frame in use is refused");
             const std::uint32_t n = frames->pool().references(held[0]);
             require(n == 2 || n == 3, "another number of references");
           },
           [=] { frames->give_unused(held); }},
          [=] {
            require(frames->pool().references(held[0]) == 2, "a reference is lost");
            frames->check(1);
          }};
}
Scenario a_frame_is_shared_twice() {
  const auto frames = std::make_shared<Frames>(1);
  const auto held = frames->take(1);
  const auto share = [=] { require(frames->pool().share(held) == 0, "a frame in use is refused"); };
  return {{share, share},
          [=] { require(frames->pool().references(held[0]) == 3, "a reference is lost"); }};
}

// Two neighbours are shared for the first time.
Scenario neighbours_are_shared() {
  const auto frames = std::make_shared<Frames>(2);
  Scenario scenario;
  for (const FrameId frame : frames->take(2)) {
    scenario.threads.push_back([=] {
      require(frames->pool().share({&frame, 1}) == 0, "a frame in use is refused");
      frames->give_unused({&frame, 1});
    });
  }
  scenario.finally = [=] { frames->check(2); };
  return scenario;
}

// One free frame and a fresh one: who wants the fresh one gets it, or who wants both does.
Scenario fresh_frames_are_taken() {
  const auto frames = std::make_shared<Frames>(2);
  frames->give(frames->take(1));
  const auto n_taken = std::make_shared<std::vector<std::size_t>>(2);
  return {{[=] {
             std::vector<FrameId> one(1);
             (*n_taken)[0] = frames->pool().take_fresh(kClass, one);
           },
           [=] { (*n_taken)[1] = frames->take(2).size(); }},
          [=] {
            require((*n_taken)[0] == ((*n_taken)[1] == 0 ? 1 : 0), "one of two takers gets all");
          }};
}

// Who counts a free frame knows that it is free.
Scenario a_count_follows_what_it_counts() {
  const auto frames = std::make_shared<Frames>(1);
  const auto held = frames->take(1);
  return {{[=] { frames->give(held); },
           [=] {
             const bool is_free = frames->pool().counts(kClass).free == 1;
             const std::uint32_t n = frames->pool().references(held[0]);
             require(!is_free || n == 0, "a frame that is counted as free is referenced");
           }},
          [=] { frames->check(0); }};
}

struct Explored {
  const char* name;
  Scenario (*scenario)();
  Bounds bounds = {};
};

const Explored kExplored[] = {
    {"a frame changes hands", a_frame_changes_hands},
    {"one holder", one_holder},
    {"two holders", two_holders, {3, 1}},
    {"a shared frame is given", a_shared_frame_is_given},
    {"a frame is shared twice", a_frame_is_shared_twice},
    {"neighbours are shared", neighbours_are_shared, {4, 2}},
    {"fresh frames are taken", fresh_frames_are_taken},
    {"a batch has two words", a_batch_has_two_words, {4, 2}},
    {"a count follows what it counts", a_count_follows_what_it_counts},
    {"givers and takers", givers_and_takers, {3, 1}},
    {"a word is emptied and filled", a_word_is_emptied_and_filled},
    {"a lent word is unmarked and recalled", a_lent_word_is_unmarked_and_recalled},
    {"two words are filled", two_words_are_filled},
    {"far words are filled", far_words_are_filled},
    {"one word is emptied and others filled", one_word_is_emptied_and_others_filled, {3, 2}},
    {"both want what is lent", both_want_what_is_lent, {4, 2}},
    {"the lender gets another", the_lender_gets_another, {4, 2}},
    {"a lent word is given to and recalled", a_lent_word_is_given_to_and_recalled, {4, 2}},
    {"a word is given to and lent", a_word_is_given_to_and_lent, {4, 2}},
    {"a magazine is filled and recalled", a_magazine_is_filled_and_recalled, {3, 2}},
    {"a recalled word is taken by another", a_recalled_word_is_taken_by_another, {3, 2}},
    {"both lend", both_lend, {4, 2}},
    {"magazines", magazines, {2, 1}},
};

// Enough for every mutant: some need more preemptions, others a load that is stale again and again.
constexpr int kMostExecutions = 20'000;
constexpr Bounds kMutantBounds[] = {{3, 2, kMostExecutions}, {1, Bounds::kAll, kMostExecutions}};

// What a scenario says of the mutant, and which one; nothing if none finds it.
std::string killer_of(const Mutant& mutant, const std::vector<std::set<Site>>& reached) {
  for (const Bounds bounds : kMutantBounds) {
    for (std::size_t i = 0; i < std::size(kExplored); ++i) {
      if (!reached[i].contains(mutant.site)) continue;
      const auto [name, scenario, unused] = kExplored[i];
      const std::optional<std::string> fault = explore(scenario, bounds, mutant).fault;
      if (fault) return std::string(name) + ": " + fault->substr(0, fault->find('\n'));
    }
  }
  return {};
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_order_is_explained) {
  for (const auto& [name, scenario, bounds] : kExplored) {
    BOOST_TEST_CONTEXT(name) {
      const Outcome outcome = explore(scenario, bounds);
      BOOST_TEST(!outcome.fault, outcome.fault.value_or(""));
      BOOST_TEST_MESSAGE(name << ": " << outcome.n_executions << " executions");
    }
  }
}

// All memory orders stronger than relaxed are needed, and that every exchange is one step.
BOOST_AUTO_TEST_CASE(every_mutant_is_killed) {
  std::vector<std::set<Site>> reached;
  std::set<Site> sites;
  for (const auto& [name, scenario, bounds] : kExplored) {
    reached.push_back(explore(scenario, {2, 1}).sites);
    sites.insert(reached.back().begin(), reached.back().end());
  }
  for (const Site& site : sites) {
    for (const Mutant& mutant : mutants_of(site)) {
      const std::string killer = killer_of(mutant, reached);
      BOOST_TEST(!killer.empty(), "survives: " << describe(mutant));
      BOOST_TEST_MESSAGE(describe(mutant) << ": " << killer);
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()
