#include "cache/cache.hpp"

#include <algorithm>
#include <mutex>
#include <thread>

#include "cache/batch.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

// FlashAttention's largest key tile: what a kernel may read past a length if nobody knows better.
constexpr Tokens kTileOverread{128};

SpaceOptions space_options(const CacheOptions& options, const Traits& traits) {
  if (options.max_seqs < 1 || options.max_seqs > (1 << 20)) {
    throw InvalidArgument("max_seqs must be between 1 and 1048576, not " +
                          std::to_string(options.max_seqs));
  }
  if (options.overread &&
      (*options.overread < Tokens(0) || *options.overread > options.max_seq_len)) {
    throw InvalidArgument("overread_tokens must be \"auto\" or between 0 and max_seq_len, not " +
                          std::to_string(options.overread->value));
  }
  const bool is_zero = options.unmapped == Unmapped::zero;
  if (options.static_len &&
      (!is_zero || *options.static_len < Tokens(1) || *options.static_len > options.max_seq_len)) {
    throw InvalidArgument(
        "static_len goes with unmapped=\"zero\", and is between 1 and max_seq_len, not " +
        std::to_string(options.static_len->value));
  }
  if (is_zero && !traits.zero_on_unmapped && !options.static_len) {
    throw InvalidArgument("unmapped=\"zero\" on " + traits.device +
                          " needs static_len: how many positions of every slot are to read as "
                          "zeros, for they take mappings there");
  }
  // All of a slot reads as zeros, or its end is a trap.
  const Tokens static_len =
      traits.zero_on_unmapped ? options.max_seq_len : options.static_len.value_or(Tokens(0));
  const bool is_all_zero = is_zero && static_len == options.max_seq_len;
  const Tokens automatic = is_all_zero ? Tokens(0) : std::min(kTileOverread, options.max_seq_len);
  return {options.max_seqs, options.max_seq_len, options.overread.value_or(automatic),
          options.unmapped, static_len,          options.scrub};
}

}  // namespace

std::shared_ptr<Cache> Cache::make(std::shared_ptr<FrameStore> store, const CacheOptions& options) {
  std::shared_ptr<Cache> cache(new Cache(std::move(store), options));
  cache->store_->add(cache.get());
  cache->store_->background().add(cache.get());
  return cache;
}

Cache::Cache(std::shared_ptr<FrameStore> store, const CacheOptions& options)
    : store_(std::move(store)),
      keep_(options.keep),
      lists_(static_cast<std::size_t>(std::max(options.max_seqs, 0))) {
  check_usable();
  Layout layout(options.layers,
                {options.max_seq_len, store_->page_size(), options.layers_per_page,
                 options.split_planes, store_->backend().traits().kind == DeviceKind::cpu});
  space_ = std::make_shared<Space>(store_, std::move(layout),
                                   space_options(options, store_->backend().traits()));
  slots_.resize(static_cast<std::size_t>(options.max_seqs));
  for (std::int32_t i = 0; i < options.max_seqs; ++i) list(SlotId(i));
}

Cache::~Cache() {
  // In a child of fork(2) the store's lock may be held by a thread that does not exist here.
  if (!store_->backend().usable()) return;
  store_->background().remove(this);
  store_->remove(this);
}

void Cache::check_usable() const {
  if (!store_->backend().usable()) {
    throw ReleasedError(
        "this process is a fork(2) child: the pool and its caches stay with the parent; make new "
        "ones here, or start workers with the \"spawn\" method");
  }
}

void Cache::check_expected(Tokens expected) {
  if (expected < Tokens(0)) {
    throw InvalidArgument("the expected number of tokens must be 0 or more, not " +
                          std::to_string(expected.value));
  }
}

void Cache::announce(SequenceState& state, Tokens expected) const noexcept {
  const Tokens longest = space_->options().max_seq_len;
  state.announced.store(static_cast<std::int32_t>(std::min(expected, longest).value),
                        std::memory_order_relaxed);
}

std::shared_ptr<Sequence> Cache::sequence(Tokens expected, Stream stream) {
  check_usable();
  check_expected(expected);
  std::shared_ptr<SequenceState> state;
  {
    const std::scoped_lock lock(mutex_);
    check_open();
    state = occupy(best_free_slot(expected));
    announce(*state, expected);
  }
  prepare(*state, stream);
  store_->background().wake();
  return std::make_shared<Sequence>(shared_from_this(), std::move(state));
}

std::shared_ptr<Batch> Cache::batch(std::vector<std::shared_ptr<Sequence>> sequences,
                                    Stream stream) {
  check_usable();
  return std::make_shared<Batch>(shared_from_this(), std::move(sequences), stream);
}

std::shared_ptr<Batch> Cache::adjacent_batch(std::int32_t n, Stream stream) {
  check_usable();
  if (n < 1) {
    throw InvalidArgument("a batch has at least one row, not " + std::to_string(n));
  }
  std::vector<std::shared_ptr<Sequence>> sequences;
  sequences.reserve(static_cast<std::size_t>(n));
  {
    const std::scoped_lock lock(mutex_);
    check_open();
    const SlotId first = adjacent_free_slots(n);
    for (std::int32_t i = 0; i < n; ++i) {
      const SlotId id(first.value + i);
      sequences.push_back(std::make_shared<Sequence>(shared_from_this(), occupy(id)));
      slot(id).is_leased = true;
    }
  }
  const SlotId first = sequences.front()->state()->slot;
  std::size_t prepared = 0;
  try {
    for (; prepared < sequences.size(); ++prepared) {
      prepare(*sequences[prepared]->state(), stream);
    }
    store_->background().wake();
    return std::make_shared<Batch>(shared_from_this(), std::move(sequences), stream,
                                   SlotLease{first, n});
  } catch (...) {
    // The one that failed has left its slot; the others do when their handles go.
    for (std::size_t i = prepared + 1; i < sequences.size(); ++i) {
      sequences[i]->state()->table.unlock();
      sequences[i]->state()->unclaim();
    }
    const std::scoped_lock lock(mutex_);
    for (std::int32_t i = 0; i < n; ++i) {
      const SlotId id(first.value + i);
      slot(id).is_leased = false;
      list(id);
    }
    throw;
  }
}

Bytes Cache::trim() {
  check_usable();
  {
    const std::scoped_lock lock(mutex_);
    check_open();
  }
  return size_of(reclaim(Pages(UINT32_MAX), Reach::waited), store_->page_size());
}

void Cache::close() {
  check_usable();
  std::vector<std::shared_ptr<SequenceState>> live;
  {
    const std::scoped_lock lock(mutex_);
    if (is_closed_) return;
    is_closed_ = true;
    for (const Slot& s : slots_) {
      if (s.live) live.push_back(s.live);
    }
  }
  // Without the mutex: the calls that are waited for here may need it to finish.
  for (const auto& state : live) {
    while (!state->try_claim(Claim::closed)) {
      if (state->is_released()) break;
      Claim lost = Claim::lost;
      if (state->claim.compare_exchange_strong(lost, Claim::closed)) break;
      std::this_thread::yield();
    }
  }
  store_->background().remove(this);
  store_->remove(this);
  std::shared_ptr<Space> last;  // freed after the lock, unless a tensor still shows it
  const std::scoped_lock lock(mutex_);
  last.swap(space_);
  for (Slot& s : slots_) s.live.reset();
  prefixes_.clear();
}

CacheFigures Cache::figures() const {
  check_usable();
  const std::scoped_lock lock(mutex_);
  check_open();
  const Bytes page_size = store_->page_size();
  CacheFigures f;
  f.reserved = space_->reserved_bytes();
  f.zeros = space_->zero_bytes();
  f.n_slots = static_cast<std::int32_t>(slots_.size());
  f.mapped = page_size * static_cast<std::uint64_t>(mapped_pages_.load(std::memory_order_relaxed));
  f.shared = page_size * static_cast<std::uint64_t>(shared_pages_.load(std::memory_order_relaxed));
  Bytes planned{};
  for (const Slot& s : slots_) {
    if (!s.live) continue;
    ++f.n_sequences;
    const Tokens length = s.live->tokens();
    const Tokens dropped{s.live->dropped.load(std::memory_order_relaxed)};
    Bytes for_length{};
    for (std::size_t lane = 0; lane < space_->n_lanes(); ++lane) {
      const Lane& l = space_->layout().lanes()[lane];
      const Tokens live = l.window ? length - dropped : length;
      f.used += l.payload_bytes * static_cast<std::uint64_t>(live.value);
      for_length += size_of(space_->pages_for(lane, length), page_size);
    }
    // What is counted as mapped ahead is there: pages only go under the mutex.
    const Bytes with_ahead = size_of(
        std::max(needed_pages(*s.live), std::min(planned_pages(*s.live), s.backed)), page_size);
    const Bytes gone =
        size_of(Pages(s.live->dropped_pages.load(std::memory_order_relaxed)), page_size);
    planned += with_ahead;
    f.ahead += with_ahead + gone - for_length;
  }
  f.partial = planned - f.ahead - f.used;
  f.kept = f.mapped - planned;
  f.n_grown_late = n_grown_late_.load(std::memory_order_relaxed);
  f.prefixes = prefixes_.figures();
  f.prefix = size_of(f.prefixes.held, page_size);
  f.merged = page_size * merged_pages_.load(std::memory_order_relaxed);
  return f;
}

std::vector<MappedPage> Cache::page_map() const {
  check_usable();
  std::vector<MappedPage> pages;
  const auto add = [&](const Space& space, SlotId id) {
    for (std::size_t lane = 0; lane < space.n_lanes(); ++lane) {
      const Span& span = space.span(id, lane);
      for (Pages page{}; page < span.end(); ++page) {
        const PageEntry entry = span[page];
        if (!entry.is_backed()) continue;
        pages.push_back({id, lane, page, entry.frame, store_->references(entry.frame)});
      }
    }
  };
  std::vector<std::shared_ptr<SequenceState>> live;
  std::shared_ptr<Space> space;
  {
    const std::scoped_lock lock(mutex_);
    check_open();
    space = space_;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].live) {
        live.push_back(slots_[i].live);
      } else if (slots_[i].is_free()) {
        add(*space, SlotId(static_cast<std::int32_t>(i)));
      }
    }
  }
  // Claims are waited for without the mutex, which their holders may need.
  for (const auto& state : live) {
    while (!state->try_claim(Claim::reclaimed)) {
      if (state->claim.load(std::memory_order_relaxed) >= Claim::released) break;
      std::this_thread::yield();
    }
    if (state->claim.load(std::memory_order_relaxed) != Claim::reclaimed) continue;
    {
      const std::scoped_lock table(state->table);
      add(*space, state->slot);
    }
    state->unclaim();
  }
  std::ranges::sort(pages, {}, [](const MappedPage& p) {
    return std::tuple(p.slot.value, p.lane, p.page.value);
  });
  return pages;
}

std::vector<Tokens> Cache::lengths() const {
  check_usable();
  const std::scoped_lock lock(mutex_);
  check_open();
  std::vector<Tokens> lengths;
  lengths.reserve(slots_.size());
  for (const Slot& s : slots_) lengths.push_back(s.live ? s.live->tokens() : Tokens(0));
  return lengths;
}

const CallCounters& Cache::calls() const { return space()->account(); }

std::shared_ptr<Space> Cache::space() const {
  check_usable();
  const std::scoped_lock lock(mutex_);
  check_open();
  return space_;
}

Pages Cache::reclaim(Pages wanted, Reach reach) noexcept {
  const std::scoped_lock lock(mutex_);
  Pages total{};
  if (is_closed_) return total;
  const bool waits = reach == Reach::waited;
  // Free slots first: their pages are a guess at what comes next. Then what live sequences have
  // mapped past their length; one that is in a call right now keeps it.
  while (total < wanted) {
    const Dropped dropped = drop_kept(wanted - total, UINT32_MAX, waits);
    if (dropped.unmapped == Pages(0)) break;
    total += dropped.freed;
  }
  if (reach == Reach::kept) return total;
  for (std::size_t i = 0; i < slots_.size() && total < wanted; ++i) {
    const SequenceState* const state = slots_[i].live.get();
    if (state == nullptr || slots_[i].backed <= needed_pages(*state)) continue;
    const SlotId id(static_cast<std::int32_t>(i));
    total += drop_surplus(id, state->tokens(), UINT32_MAX, waits);
  }
  // What others may yet begin with goes last.
  if (total < wanted) total += evict_prefixes(wanted - total);
  return total;
}

Pages Cache::reclaimable() const noexcept {
  const std::scoped_lock lock(mutex_);
  if (is_closed_) return Pages(0);
  Pages pages{};
  for (const Slot& s : slots_) {
    const Pages needed = s.live ? needed_pages(*s.live) : Pages(0);
    if (!s.is_retired && s.backed > needed) pages += s.backed - needed;
  }
  return pages + prefixes_.evictable();
}

}  // namespace kvspan
