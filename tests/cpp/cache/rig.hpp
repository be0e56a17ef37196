// What the cache tests run on: a host backend inside a FaultyBackend, small pages, and a cache of
// tokens of 1,280 bytes (51.2 to a page) in one or two lanes, written and read as whole tokens.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "backend/host_backend.hpp"
#include "cache/batch.hpp"
#include "cache/cache.hpp"
#include "support/faulty_backend.hpp"

namespace kvspan::test {

inline constexpr Bytes kTestPage = kKiB * 64;

struct RigOptions {
  std::uint32_t n_pages = 64;
  std::uint8_t largest_class = 0;
  std::int32_t layers_per_page = 2;
  std::int32_t max_seqs = 8;
  std::optional<Bytes> keep{};
  Scrub scrub = Scrub::cross;
  std::optional<Tokens> window{};
  std::int64_t max_seq_len = 1000;
  std::optional<Tokens> static_len{};  // on a device that has no zeros of its own
};

// Of the tokens that Rig::write writes under a mark.
inline std::vector<std::int32_t> token_ids(std::int32_t mark, std::int64_t n) {
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < n; ++i) ids.push_back(mark * 100'000 + i);
  return ids;
}

class Rig {
 public:
  explicit Rig(const RigOptions& options = {}) {
    const Bytes capacity = kTestPage * options.n_pages;
    const SizeClass largest(options.largest_class);
    auto owned = std::make_unique<FaultyBackend>(make_host_backend({.page_size = kTestPage,
                                                                    .capacity = capacity,
                                                                    .largest_class = largest,
                                                                    .huge_pages = false}));
    backend = owned.get();
    if (options.static_len) backend->have_no_zeros();
    store = std::make_shared<FrameStore>(std::move(owned), capacity, largest);
    cache_options.layers.assign(2, {.planes = {{"k", DType::f32, 5, 32}, {"v", DType::f32, 5, 32}},
                                    .window = options.window});
    cache_options.max_seqs = options.max_seqs;
    cache_options.max_seq_len = Tokens(options.max_seq_len);
    cache_options.layers_per_page = options.layers_per_page;
    cache_options.keep = options.keep;
    cache_options.scrub = options.scrub;
    cache_options.static_len = options.static_len;
    cache_options.overread = Tokens(0);  // as on a host, so that the same pages are shared
    cache = Cache::make(store, cache_options);
  }

  // Fills a token with its sequence's mark and its position, in every lane.
  void write(const Sequence& sequence, std::int32_t mark, std::int64_t from, std::int64_t to) {
    each(sequence, from, to, [&](std::int32_t* word, std::int64_t position) {
      *word = mark * 100'000 + static_cast<std::int32_t>(position);
    });
  }

  bool holds(const Sequence& sequence, std::int32_t mark, std::int64_t from, std::int64_t to) {
    bool ok = true;
    each(sequence, from, to, [&](const std::int32_t* word, std::int64_t position) {
      ok = ok && *word == mark * 100'000 + static_cast<std::int32_t>(position);
    });
    return ok;
  }

  // Reads all that must read as zeros: memory that is not mapped there would end the test.
  bool windows_read_as_zeros() const {
    const auto space = cache->space();
    bool ok = true;
    for (std::int32_t slot = 0; slot < cache_options.max_seqs; ++slot) {
      for (std::size_t lane = 0; lane < space->n_lanes(); ++lane) {
        const Span& span = space->span(SlotId(slot), lane);
        for (Pages page{}; page < span.window(); ++page) {
          const auto* words = reinterpret_cast<const std::int32_t*>(span.address_of(page).value);
          const std::size_t n_words = kTestPage.value / sizeof(std::int32_t);
          for (std::size_t i = 0; i < n_words; i += n_words / 4 - 1) {
            ok = ok && (words[i] == 0 || span[page].is_backed());
          }
        }
      }
    }
    return ok;
  }

  // A sequence of `n` tokens that are written.
  std::shared_ptr<Sequence> grown(std::int32_t mark, std::int64_t n) {
    auto sequence = cache->sequence(Tokens(0));
    sequence->extend(Tokens(n), {});
    write(*sequence, mark, 0, n);
    return sequence;
  }

  FaultyBackend* backend;  // the store's
  std::shared_ptr<FrameStore> store;
  CacheOptions cache_options;
  std::shared_ptr<Cache> cache;

 private:
  template <class F>
  void each(const Sequence& sequence, std::int64_t from, std::int64_t to, F f) {
    const auto space = cache->space();
    const SlotId slot = sequence.state()->slot;
    for (std::size_t lane = 0; lane < space->n_lanes(); ++lane) {
      const Address base = space->span(slot, lane).address_of(Pages(0));
      const std::uint64_t token_bytes = space->layout().lanes()[lane].token_bytes.value;
      for (std::int64_t position = from; position < to; ++position) {
        const Address token = base + space->byte_of(lane, Tokens(position));
        f(reinterpret_cast<std::int32_t*>(token.value), position);
        f(reinterpret_cast<std::int32_t*>(token.value + token_bytes - 4), position);
      }
    }
  }
};

// mapped = used + partial + ahead + kept, and what is mapped or known as a prefix, each frame once,
// is in use in the pool.
inline bool figures_add_up(const Rig& rig) {
  const CacheFigures f = rig.cache->figures();
  return f.mapped == f.used + f.partial + f.ahead + f.kept && f.partial <= f.mapped &&
         f.kept <= f.mapped &&
         f.mapped + f.prefix - f.shared + f.zeros == rig.store->counts().in_use;
}

}  // namespace kvspan::test
