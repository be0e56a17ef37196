#include "span/frame_store.hpp"

#include <algorithm>
#include <string>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

Pages checked_pages(Bytes capacity, Bytes page_size) {
  if (capacity == Bytes(0) || capacity.value % page_size.value != 0) {
    throw InvalidArgument("a pool's capacity is a positive multiple of its page size (" +
                          to_string(page_size) + "), not " + to_string(capacity));
  }
  const std::uint64_t pages = capacity.value / page_size.value;
  if (pages > FrameId::kMaxIndex) {
    throw InvalidArgument("a pool has at most " + std::to_string(FrameId::kMaxIndex) +
                          " pages; take larger pages than " + to_string(page_size));
  }
  return Pages(static_cast<std::uint32_t>(pages));
}

// Calls f(run) for every run of adjacent ids.
template <class F>
void for_each_run(std::span<const FrameId> frames, F f) {
  for (std::size_t i = 0; i < frames.size();) {
    std::uint32_t n = 1;
    while (i + n < frames.size() && frames[i + n] == frames[i].next(n)) ++n;
    f(FrameRun{frames[i], n});
    i += n;
  }
}

}  // namespace

FrameStore::FrameStore(std::unique_ptr<Backend> backend, Bytes capacity, SizeClass largest,
                       Bytes ready)
    : backend_(std::move(backend)),
      page_size_(backend_->traits().page_size),
      capacity_(checked_pages(capacity, page_size_)),
      ready_(ready),
      pool_(capacity_, largest) {
  for (std::uint8_t c = 0; c <= largest.value; ++c) {
    states_.push_back(std::make_unique<State[]>((capacity_.value >> c) + 1));
  }
}

OwnerTag FrameStore::new_owner() noexcept {
  return OwnerTag(next_owner_.fetch_add(1, std::memory_order_relaxed));
}

FrameStore::State& FrameStore::state_of(FrameId frame) noexcept {
  return states_[frame.size_class().value][frame.index()];
}

void FrameStore::take(std::span<const Gap> gaps, std::vector<Taken>& out, Effort effort) {
  // Two ways to be short: of ids or budget (try_take says false) or of the machine's memory (the
  // backend throws). Pages that are reclaimed help against both, for their frames exist already.
  const std::size_t before = out.size();
  try {
    if (try_take(gaps, out, Breaking::no)) return;
  } catch (const OutOfMemory&) {
    out.resize(before);
  }

  Pages wanted{};
  for (const Gap& gap : gaps) wanted += gap.pages;
  const std::scoped_lock lock(pressure_);
  const Counts before_reclaiming = counts();
  const Bytes unused = before_reclaiming.capacity - before_reclaiming.in_use;
  const Bytes asked = size_of(wanted, page_size_);
  // Nobody loses anything to a request that would fail all the same.
  if (asked > unused + reclaimable_by_all()) throw_out_of_memory(asked);
  // What is unused may do, in frames of other classes.
  if (asked <= unused && try_take_or_not(gaps, out)) return;
  for (const Reach reach : {Reach::kept, Reach::idle, Reach::waited}) {
    // First only what the capacity lacks; if that does not do, the machine is short as well.
    Pages missing = wanted;
    if (reach != Reach::waited && asked > unused) {
      missing = Pages(static_cast<std::uint32_t>((asked - unused).value / page_size_.value));
    }
    for (Reclaimer* reclaimer : reclaimers_) {
      const Pages found = reclaimer->reclaim(missing, reach);
      if (found >= missing) break;
      missing -= found;
    }
    if (reach == Reach::waited ? try_take(gaps, out, Breaking::yes) : try_take_or_not(gaps, out)) {
      return;
    }
    if (effort == Effort::kept) break;
  }
  throw_out_of_memory(asked);
}

Bytes FrameStore::reclaimable_by_all() const noexcept {
  Pages pages{};
  for (const Reclaimer* reclaimer : reclaimers_) pages += reclaimer->reclaimable();
  return size_of(pages, page_size_);
}

void FrameStore::throw_out_of_memory(Bytes asked) const {
  const Counts now = counts();
  throw OutOfMemory(asked, now.capacity - now.in_use, reclaimable_by_all(),
                    "the pool's capacity is " + to_string(now.capacity) +
                        ": release or truncate sequences, or make a larger pool");
}

// As try_take, but a machine that is short of memory makes it fail like a pool that is.
bool FrameStore::try_take_or_not(std::span<const Gap> gaps, std::vector<Taken>& out) {
  const std::size_t before = out.size();
  try {
    return try_take(gaps, out, Breaking::yes);
  } catch (const OutOfMemory&) {
    out.resize(before);
    return false;
  }
}

bool FrameStore::try_take(std::span<const Gap> gaps, std::vector<Taken>& out, Breaking breaking) {
  const std::size_t before = out.size();
  std::vector<FrameId> frames;
  const auto undo = [&] {
    for (std::size_t i = before; i < out.size(); ++i) pool_.give({&out[i].frame, 1});
    out.resize(before);
  };
  try {
    for (const Gap& gap : gaps) {
      Pages left = gap.pages;
      // A buddy decomposition: as many of the largest frames as there are, then of the next class.
      const auto cover = [&] {
        for (int c = pool_.largest_class().value; c >= 0 && left > Pages(0); --c) {
          const SizeClass size_class{static_cast<std::uint8_t>(c)};
          take_class(size_class, left.value >> c, frames);
          for (const FrameId frame : frames) out.push_back({frame});
          left -= Pages(static_cast<std::uint32_t>(frames.size() << c));
          frames.clear();  // from here on they are `out`'s
        }
      };
      cover();
      // Free frames of larger classes hold memory that the budget lacks for small ones.
      if (breaking == Breaking::yes && left > Pages(0) && release_free(left) > Pages(0)) {
        cover();
      }
      if (left > Pages(0)) {
        undo();
        return false;
      }
    }
  } catch (...) {
    for (const FrameId frame : frames) out.push_back({frame});
    undo();
    throw;
  }
  // Only now that nothing can fail: a frame that goes back must not seem cleaner than it is.
  std::size_t i = before;
  for (const Gap& gap : gaps) {
    for (Pages covered{}; covered < gap.pages; ++i) {
      Taken& taken = out[i];
      const std::uint32_t last =
          state_of(taken.frame).exchange(gap.owner.value, std::memory_order_relaxed);
      taken.is_dirty = last != kClean && (gap.always_scrub || last != gap.owner.value);
      covered += pages_of(taken.frame.size_class());
    }
  }
  return true;
}

// Up to n frames of the class: those that there are, then new ones as far as the budget goes.
// Appends them to `frames`, also those that came before it throws.
void FrameStore::take_class(SizeClass c, std::size_t n, std::vector<FrameId>& frames) {
  std::vector<FrameId> there(std::min<std::uint64_t>(n, pool_.counts(c).free));
  // Others may be quicker: half of it, and half of that.
  while (!there.empty() && !pool_.take_recycled(c, there)) there.resize(there.size() / 2);
  frames.insert(frames.end(), there.begin(), there.end());
  if (there.size() < n) make_frames(c, n - there.size(), frames);
}

void FrameStore::make_frames(SizeClass c, std::size_t n, std::vector<FrameId>& frames) {
  n = reserve_budget(c, n);
  if (n == 0) return;
  std::vector<FrameId> made = ids_without_memory(c, n);
  const auto free_budget = [&](std::size_t n_frames) {
    created_.fetch_sub(std::uint64_t{n_frames} << c.value, std::memory_order_relaxed);
  };
  free_budget(n - made.size());

  std::size_t n_made = 0;
  const auto append = [&] {
    frames.insert(frames.end(), made.begin(), made.begin() + static_cast<std::ptrdiff_t>(n_made));
  };
  try {
    for_each_run(made, [&](FrameRun run) {
      backend_->create(run);
      const auto state = backend_->traits().creates_zeros ? kClean : kDirty;
      for (std::uint32_t k = 0; k < run.count; ++k) {
        state_of(run.first.next(k)).store(state, std::memory_order_relaxed);
      }
      n_made += run.count;
    });
  } catch (...) {
    // What was made stays: with what was there, it is the caller's to use or to give back.
    free_budget(made.size() - n_made);
    put_aside(c, std::span(made).subspan(n_made));
    append();
    throw;
  }
  append();
}

// Takes as much of the budget as there is for n frames, and returns for how many that is.
std::size_t FrameStore::reserve_budget(SizeClass c, std::size_t n) noexcept {
  std::uint64_t now = created_.load(std::memory_order_relaxed);
  for (;;) {
    const std::uint64_t most = std::min<std::uint64_t>(n, (capacity_.value - now) >> c.value);
    if (most == 0) return 0;
    if (created_.compare_exchange_weak(now, now + (most << c.value), std::memory_order_relaxed)) {
      return most;
    }
  }
}

// Up to n.
std::vector<FrameId> FrameStore::ids_without_memory(SizeClass c, std::size_t n) {
  std::vector<FrameId> ids;
  ids.reserve(n);
  {
    const std::scoped_lock lock(aside_mutex_);
    std::vector<FrameId>& aside = aside_[c.value];
    const std::size_t n_old = std::min(n, aside.size());
    ids.insert(ids.end(), aside.rbegin(), aside.rbegin() + static_cast<std::ptrdiff_t>(n_old));
    aside.resize(aside.size() - n_old);
    n_aside_[c.value].fetch_sub(n_old, std::memory_order_relaxed);
  }
  std::ranges::sort(ids);
  std::vector<FrameId> fresh(n - ids.size());
  while (!fresh.empty() && !pool_.take_fresh(c, fresh)) fresh.resize(fresh.size() / 2);
  ids.insert(ids.end(), fresh.begin(), fresh.end());
  return ids;
}

void FrameStore::put_aside(SizeClass c, std::span<const FrameId> ids) {
  const std::scoped_lock lock(aside_mutex_);
  aside_[c.value].insert(aside_[c.value].end(), ids.begin(), ids.end());
  n_aside_[c.value].fetch_add(ids.size(), std::memory_order_relaxed);
}

void FrameStore::share(FrameId frame) {
  if (pool_.share({&frame, 1}) != 0) {
    throw InvalidArgument("frame " + std::to_string(frame.value) +
                          " is not in use and cannot be shared");
  }
}

Pages FrameStore::give(std::span<const FrameId> frames) noexcept {
  Pages freed{};
  for (std::size_t i = 0; i < frames.size();) {
    std::size_t n = 1;
    while (i + n < frames.size() && frames[i + n].size_class() == frames[i].size_class()) ++n;
    const auto given = pool_.give(frames.subspan(i, n));
    freed += pages_of(frames[i].size_class()) * given.freed;
    i += n;
  }
  return freed;
}

void FrameStore::give_back(std::span<const Taken> taken) noexcept {
  for (const Taken& t : taken) {
    // Before giving: from then on the frame may be somebody else's.
    if (t.is_dirty) state_of(t.frame).store(kDirty, std::memory_order_relaxed);
    give({&t.frame, 1});
  }
}

void FrameStore::create_ahead(Bytes size) {
  const std::uint64_t wanted = div_up(size.value, page_size_.value);
  const std::uint64_t free = pool_.counts(SizeClass(0)).free;
  if (wanted <= free) return;
  std::vector<FrameId> frames;
  const std::uint64_t room = capacity_.value - created_.load(std::memory_order_relaxed);
  try {
    if (wanted - free <= room) make_frames(SizeClass(0), wanted - free, frames);
  } catch (...) {
    pool_.give(frames);
    throw;
  }
  pool_.give(frames);
  if (frames.size() < wanted - free) {
    const Counts have = counts();
    throw OutOfMemory(size, have.capacity - have.in_use, Bytes(0),
                      "create fewer frames ahead, or make a larger pool");
  }
}

std::size_t FrameStore::frames_to_keep_ready(SizeClass c, Bytes& left) const noexcept {
  // Decoding takes single pages all the time, a prompt a few frames of each larger class.
  constexpr std::uint64_t kSinglePages = 64, kLargerFrames = 2;
  const Bytes size = size_of(pages_of(c), page_size_);
  const std::uint64_t wanted =
      std::min(c == SizeClass(0) ? kSinglePages : kLargerFrames, left.value / size.value);
  left -= size * wanted;
  return wanted;
}

WorkDone FrameStore::keep_ready() noexcept {
  Bytes left = ready_;
  for (std::uint8_t c = 0; c <= largest_class().value; ++c) {
    const std::size_t wanted = frames_to_keep_ready(SizeClass(c), left);
    if (pool_.counts(SizeClass(c)).free >= wanted) continue;
    std::vector<FrameId> frames;
    try {
      make_frames(SizeClass(c), 1, frames);
    } catch (const std::exception&) {
      // The machine is short of memory, or the driver fails: whoever needs a frame will be told.
    }
    pool_.give(frames);
    if (!frames.empty()) return {.n_frames = 1, .is_idle = true, .has_more = true};
  }
  if (merge_two()) return {.n_frames = 1, .is_idle = true, .has_more = true};
  return {};
}

// Makes one frame of two of the next smaller class, where those lie idle and that is what is short:
// without it, all frames would end up as single pages.
bool FrameStore::merge_two() noexcept {
  constexpr std::uint64_t kIdle = 8, kShort = 2;
  for (std::uint8_t i = 0; i < largest_class().value; ++i) {
    const SizeClass c(i), larger(static_cast<std::uint8_t>(i + 1));
    if (pool_.counts(c).free < kIdle || pool_.counts(larger).free >= kShort) continue;
    std::array<FrameId, 2> two;
    if (!pool_.take_recycled(c, two)) continue;
    std::vector<FrameId> made;
    try {
      release(c, two);
      make_frames(larger, 1, made);
    } catch (const std::exception&) {
      // The memory of the two is back in the budget; whoever needs a frame makes one.
    }
    pool_.give(made);
    return !made.empty();
  }
  return false;
}

Bytes FrameStore::trim() {
  std::scoped_lock lock(pressure_);
  return size_of(release_free(capacity_), page_size_);
}

Pages FrameStore::release_free(Pages wanted) {
  Pages released{};
  // Single pages last: whoever asks has used those, where they would do.
  for (std::uint8_t i = 1; i <= largest_class().value + 1 && released < wanted; ++i) {
    const SizeClass c(i <= largest_class().value ? i : std::uint8_t{0});
    const std::uint64_t missing = ((wanted - released).value + pages_of(c).value - 1) >> c.value;
    std::vector<FrameId> frames(std::min<std::uint64_t>(missing, pool_.counts(c).free));
    while (!frames.empty() && !pool_.take_recycled(c, frames)) frames.resize(frames.size() / 2);
    std::ranges::sort(frames);
    release(c, frames);
    released += pages_of(c) * static_cast<std::uint32_t>(frames.size());
  }
  return released;
}

// Gives the memory of frames of one class, which nobody else has, back to the machine.
void FrameStore::release(SizeClass c, std::span<const FrameId> frames) {
  for_each_run(frames, [&](FrameRun run) {
    backend_->release(run);
    for (std::uint32_t k = 0; k < run.count; ++k) {
      state_of(run.first.next(k)).store(kAbsent, std::memory_order_relaxed);
    }
    created_.fetch_sub(run.pages().value, std::memory_order_relaxed);
  });
  put_aside(c, frames);
}

FrameStore::Counts FrameStore::counts() const noexcept {
  std::uint64_t in_use = 0;
  for (std::uint8_t c = 0; c <= pool_.largest_class().value; ++c) {
    in_use += (pool_.counts(SizeClass(c)).in_use - n_aside_[c].load(std::memory_order_relaxed))
              << c;
  }
  return {size_of(capacity_, page_size_), Bytes(in_use * page_size_.value),
          Bytes(created_.load(std::memory_order_relaxed) * page_size_.value)};
}

Bytes FrameStore::reclaimable() const noexcept {
  std::scoped_lock lock(pressure_);
  return reclaimable_by_all();
}

void FrameStore::add(Reclaimer* reclaimer) {
  std::scoped_lock lock(pressure_);
  reclaimers_.push_back(reclaimer);
}

void FrameStore::remove(Reclaimer* reclaimer) noexcept {
  std::scoped_lock lock(pressure_);
  std::erase(reclaimers_, reclaimer);
}

}  // namespace kvspan
