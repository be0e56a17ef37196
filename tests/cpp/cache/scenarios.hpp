// One scene and every operation on it that calls the driver, for the tests that fail those calls:
// test_faults.cpp fails one call, test_lost.cpp all of them from one on.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "cache/rig.hpp"

namespace kvspan::test {

// A sequence of 130 tokens and a fork of it, one of 102, and three rows in adjacent slots.
struct Scene {
  explicit Scene(const RigOptions& options) : rig(options) {
    // 51.2 tokens to a page and lane at two lanes: the last page of `a` is partly filled, and the
    // next tokens of `b` cross into a new one.
    a = rig.grown(1, kWritten[1]);
    b = rig.grown(2, kWritten[2]);
    rows = rig.cache->adjacent_batch(3);
    for (int i = 0; i < 3; ++i) {
      const auto& row = rows->rows()[static_cast<std::size_t>(i)];
      row->extend(Tokens(kWritten[3 + i]), {});
      rig.write(*row, 3 + i, 0, kWritten[3 + i]);
    }
    forked = a->fork(1, {}, {}).front();
  }

  void select(const std::vector<std::int32_t>& order) {
    rows->select(order, {});
    std::vector<std::int32_t> selected;
    for (const std::int32_t row : order) selected.push_back(marks[static_cast<std::size_t>(row)]);
    marks = selected;
  }

  // Every sequence that is not released, with its mark.
  std::vector<std::pair<std::shared_ptr<Sequence>, std::int32_t>> sequences() const {
    std::vector<std::pair<std::shared_ptr<Sequence>, std::int32_t>> all = {
        {a, 1}, {b, 2}, {forked, 1}};
    for (std::size_t i = 0; i < rows->size(); ++i) all.emplace_back(rows->rows()[i], marks[i]);
    std::erase_if(all, [](const auto& s) { return s.first->is_released(); });
    return all;
  }

  bool holds(const Sequence& sequence, std::int32_t mark) {
    std::int64_t n = std::min(sequence.length().value, kWritten[mark]);
    if (&sequence == forked.get()) n = std::min(n, forked_written);
    return rig.holds(sequence, mark, sequence.dropped().value, n);
  }
  bool bytes_hold() {
    return std::ranges::all_of(sequences(),
                               [&](const auto& s) { return holds(*s.first, s.second); });
  }

  // All that a failure must leave as it was, as text; what is kept counts, or does not.
  std::string figures(bool with_kept) const {
    const CacheFigures f = rig.cache->figures();
    const Bytes kept = with_kept ? Bytes(0) : f.kept;
    std::string text;
    for (const Bytes n : {f.mapped - kept, f.used, f.partial, f.ahead, f.kept - kept, f.shared,
                          rig.store->counts().in_use - kept}) {
      text += std::to_string(n.value) + " ";
    }
    for (const auto& [sequence, mark] : sequences()) {
      text += std::to_string(mark) + ":" + std::to_string(sequence->length().value) + " ";
    }
    return text + std::to_string(f.n_sequences);
  }

  static constexpr std::int64_t kWritten[] = {0, 130, 102, 90, 91, 92};  // tokens, by mark
  Rig rig;
  std::shared_ptr<Sequence> a, b, forked;
  std::int64_t forked_written = kWritten[1];
  std::shared_ptr<Batch> rows;
  std::shared_ptr<Cache> other;
  std::vector<std::int32_t> marks = {3, 4, 5};  // of the rows
};

struct Operation {
  const char* name;
  std::function<void(Scene&)> prepare;
  std::function<void(Scene&)> run;
  bool may_throw = true;        // some do their driver work noexcept
  bool may_spend_kept = false;  // what free slots keep mapped may be gone after a failure
};

inline const std::vector<Operation>& operations() {
  static const auto nothing = [](Scene&) {};
  static const std::vector<Operation> all = {
      {"extend", nothing, [](Scene& s) { s.a->extend(Tokens(200), {}); }},
      {"step across pages", nothing,
       [](Scene& s) { s.rig.cache->batch({s.a, s.b, s.forked})->step(Tokens(40), {}); }},
      {"fork", nothing, [](Scene& s) { s.a->fork(1, {}, {}); }},
      {"fork of a fork", [](Scene& s) { s.forked->extend(Tokens(60), {}); },
       [](Scene& s) { s.forked->fork(1, {}, {}); }},
      {"extend into a shared page",
       [](Scene& s) { s.forked->truncate(Tokens(s.forked_written = 20), {}); },
       [](Scene& s) { s.forked->extend(Tokens(60), {}); }},
      {"truncate with shared pages", nothing, [](Scene& s) { s.forked->truncate(Tokens(1), {}); }},
      {"truncate with a surplus", [](Scene& s) { s.b->extend(Tokens(800), {}); },
       [](Scene& s) { s.b->truncate(Tokens(10), {}); }},
      {"fork many, earlier", nothing, [](Scene& s) { s.a->fork(3, Tokens(60), {}); }},
      {"publish", nothing, [](Scene& s) { s.a->publish(token_ids(1, 130), true, {}); }},
      {"publish what is known",
       [](Scene& s) { s.rig.grown(1, 130)->publish(token_ids(1, 130), false, {}); },
       [](Scene& s) { s.a->publish(token_ids(1, 130), true, {}); }},
      {"begin with a prefix", [](Scene& s) { s.a->publish(token_ids(1, 130), true, {}); },
       [](Scene& s) { s.rig.cache->sequence(token_ids(1, 120), "", Tokens(0), {}); }},
      {"reorder", nothing,
       [](Scene& s) {
         const std::shared_ptr<Sequence> both[] = {s.a, s.forked};
         s.rig.cache->reorder(both, std::vector<std::int32_t>{1, 1}, {});
       }},
      {"release", nothing, [](Scene& s) { s.forked->release({}); }},
      {"select", nothing, [](Scene& s) { s.select({2, 0, 0}); }},
      {"select fewer", nothing, [](Scene& s) { s.select({1}); }},
      {"select more", [](Scene& s) { s.select({1}); }, [](Scene& s) { s.select({0, 0, 0}); }},
      {"drop_before", nothing, [](Scene& s) { s.a->drop_before(Tokens(100), {}); }},
      {"trim",
       [](Scene& s) {
         s.b->extend(Tokens(400), {});
         s.b->truncate(Tokens(300), {});
         s.rig.grown(9, 100)->release({});
       },
       [](Scene& s) { s.rig.cache->trim(); }, false},
      {"a new sequence over kept pages", [](Scene& s) { s.rig.grown(9, 100)->release({}); },
       [](Scene& s) { s.rig.cache->sequence(Tokens(100)); }},
      {"adjacent sequences over kept pages",
       [](Scene& s) {
         for (int i = 0; i < 3; ++i) s.rig.grown(9, 60)->release({});
       },
       [](Scene& s) { s.rig.cache->adjacent_batch(3); }, true, true},
      {"another cache", nothing,
       [](Scene& s) { s.other = Cache::make(s.rig.store, s.rig.cache_options); }},
      {"create ahead", nothing, [](Scene& s) { s.rig.store->create_ahead(kTestPage * 20); }},
  };
  return all;
}

// The sizes of frames and lanes that every operation is tried with; one lane also with windows.
template <class F>
void for_each_shape(F f) {
  const std::pair<std::int32_t, std::optional<Tokens>> lanes_and_windows[] = {
      {2, {}}, {1, {}}, {2, Tokens(160)}};
  for (const std::uint8_t largest_class : {std::uint8_t{0}, std::uint8_t{2}}) {
    for (const auto& [layers_per_page, static_len] : lanes_and_windows) {
      f(RigOptions{.n_pages = 160,
                   .largest_class = largest_class,
                   .layers_per_page = layers_per_page,
                   .max_seqs = 12,
                   .scrub = Scrub::reuse,
                   .window = Tokens(20),
                   .static_len = static_len});
    }
  }
}

}  // namespace kvspan::test
