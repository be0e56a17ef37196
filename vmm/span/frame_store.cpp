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
    if (try_take(gaps, out)) return;
  } catch (const OutOfMemory&) {
    out.resize(before);
    if (effort == Effort::spare) throw;
  }

  Pages wanted{};
  for (const Gap& gap : gaps) wanted += gap.pages;
  if (effort == Effort::spare) {
    const Counts now = counts();
    throw OutOfMemory(size_of(wanted, page_size_), now.capacity - now.in_use, Bytes(0),
                      "nothing is taken from others ahead of need");
  }
  const std::scoped_lock lock(pressure_);
  const Counts before_reclaiming = counts();
  const Bytes unused = before_reclaiming.capacity - before_reclaiming.in_use;
  const Bytes asked = size_of(wanted, page_size_);
  // Nobody loses anything to a request that would fail all the same.
  if (asked > unused + reclaimable_by_all()) throw_out_of_memory(asked);
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
    try {
      if (try_take(gaps, out)) return;
      // Free frames of other size classes hold memory that the budget lacks for new ones.
      if (largest_class() > SizeClass(0) && release_free(wanted) > Pages(0) &&
          try_take(gaps, out)) {
        return;
      }
    } catch (const OutOfMemory&) {
      out.resize(before);
      if (reach == Reach::waited) throw;
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

bool FrameStore::try_take(std::span<const Gap> gaps, std::vector<Taken>& out) {
  const std::size_t before = out.size();
  std::vector<FrameId> frames;
  const auto undo = [&] {
    for (std::size_t i = before; i < out.size(); ++i) pool_.give({&out[i].frame, 1});
    out.resize(before);
  };
  try {
    for (const Gap& gap : gaps) {
      // A buddy decomposition: as many of the largest frames as fit, then of the next class. Where
      // a class is short its pages are made up of smaller frames.
      Pages left = gap.pages;
      for (int c = pool_.largest_class().value; c >= 0 && left > Pages(0); --c) {
        const SizeClass size_class{static_cast<std::uint8_t>(c)};
        std::size_t n = left.value >> c;
        frames.clear();
        while (n > 0 && !try_take_class(size_class, n, frames)) n = c == 0 ? 0 : n / 2;
        for (const FrameId frame : frames) out.push_back({frame});
        left -= Pages(static_cast<std::uint32_t>(frames.size() << c));
      }
      if (left > Pages(0)) {
        undo();
        return false;
      }
    }
  } catch (...) {
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

bool FrameStore::try_take_class(SizeClass c, std::size_t n, std::vector<FrameId>& frames) {
  frames.resize(n);
  bool taken = pool_.take(c, frames);
  try {
    if (taken && !create_absent(frames)) {
      pool_.give(frames);
      taken = false;
    }
  } catch (...) {
    pool_.give(frames);
    frames.clear();
    throw;
  }
  if (!taken) frames.clear();
  return taken;
}

bool FrameStore::create_absent(std::span<const FrameId> frames) {
  // Frames that were created before a failure stay: they are free frames with memory, in budget.
  std::size_t i = 0;
  while (i < frames.size()) {
    if (state_of(frames[i]).load(std::memory_order_relaxed) != kAbsent) {
      ++i;
      continue;
    }
    FrameRun run{frames[i], 1};
    while (i + run.count < frames.size() && frames[i + run.count] == run.first.next(run.count) &&
           state_of(frames[i + run.count]).load(std::memory_order_relaxed) == kAbsent) {
      ++run.count;
    }
    if (!reserve_budget(run.pages())) return false;
    try {
      backend_->create(run);
    } catch (...) {
      created_.fetch_sub(run.pages().value, std::memory_order_relaxed);
      throw;
    }
    const auto state = backend_->traits().creates_zeros ? kClean : kDirty;
    for (std::uint32_t k = 0; k < run.count; ++k) {
      state_of(run.first.next(k)).store(state, std::memory_order_relaxed);
    }
    present_[run.first.size_class().value].fetch_add(run.count, std::memory_order_relaxed);
    i += run.count;
  }
  return true;
}

bool FrameStore::reserve_budget(Pages pages) noexcept {
  std::uint64_t now = created_.load(std::memory_order_relaxed);
  do {
    if (now + pages.value > capacity_.value) return false;
  } while (!created_.compare_exchange_weak(now, now + pages.value, std::memory_order_relaxed));
  return true;
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
  const FramePool::Counts now = pool_.counts(SizeClass(0));
  if (wanted <= now.free) return;
  std::vector<FrameId> frames;
  const std::uint64_t n = std::min<std::uint64_t>(wanted, now.free + now.fresh);
  if (n < wanted || !try_take_class(SizeClass(0), n, frames)) {
    const Counts have = counts();
    throw OutOfMemory(size, have.capacity - have.in_use, Bytes(0),
                      "create fewer frames ahead, or make a larger pool");
  }
  pool_.give(frames);
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
    const std::uint64_t present = present_[c].load(std::memory_order_relaxed);
    if (present >= pool_.counts(SizeClass(c)).in_use + wanted) continue;
    if (create_one(SizeClass(c))) return {.n_frames = 1, .is_idle = true, .has_more = true};
  }
  return {};
}

bool FrameStore::create_one(SizeClass c) noexcept {
  // A fresh id: taking recycled ones would take ready frames away from others meanwhile. Frames
  // that were trimmed are created again by those who need them.
  FrameId frame;
  if (!pool_.take_fresh(c, {&frame, 1})) return false;
  bool is_created = false;
  try {
    is_created = create_absent({&frame, 1});
  } catch (const std::exception&) {
    // The machine is short of memory, or the driver fails: whoever needs a frame will be told.
  }
  pool_.give({&frame, 1});
  return is_created;
}

Bytes FrameStore::trim() {
  std::scoped_lock lock(pressure_);
  return size_of(release_free(capacity_), page_size_);
}

Pages FrameStore::release_free(Pages wanted) {
  // The frames are held until all are done, or the same ones would be found again. Whoever finds
  // too few meanwhile waits for `pressure_` and tries again.
  Pages released{};
  for (int c = pool_.largest_class().value; c >= 0 && released < wanted; --c) {
    const SizeClass size_class{static_cast<std::uint8_t>(c)};
    // Others take and give meanwhile: as many as there are at the moment of taking.
    std::vector<FrameId> held(pool_.counts(size_class).free);
    while (!held.empty() && !pool_.take(size_class, held))
      held.resize(pool_.counts(size_class).free);
    std::vector<FrameId> present;
    for (const FrameId frame : held) {
      const bool is_enough = released.value + (present.size() << c) >= wanted.value;
      if (is_enough) break;
      if (state_of(frame).load(std::memory_order_relaxed) != kAbsent) present.push_back(frame);
    }
    for_each_run(present, [&](FrameRun run) {
      backend_->release(run);
      for (std::uint32_t k = 0; k < run.count; ++k) {
        state_of(run.first.next(k)).store(kAbsent, std::memory_order_relaxed);
      }
      created_.fetch_sub(run.pages().value, std::memory_order_relaxed);
      present_[run.first.size_class().value].fetch_sub(run.count, std::memory_order_relaxed);
      released += run.pages();
    });
    pool_.give(held);
  }
  return released;
}

FrameStore::Counts FrameStore::counts() const noexcept {
  std::uint64_t in_use = 0;
  for (std::uint8_t c = 0; c <= pool_.largest_class().value; ++c) {
    in_use += pool_.counts(SizeClass(c)).in_use << c;
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
