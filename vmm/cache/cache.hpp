// A cache: the KV tensors of one model, with sequences in slots. Sequences grow, shrink, fork and
// go; the tensors over them never move.
//
// A slot that is free keeps the pages of its last sequence mapped, up to a limit, and the next
// sequence takes them over without a driver call (deferred reclamation); under pressure the frame
// store asks for them back.
//
// Sequences share pages: with forks, and with whoever begins with the same tokens (the prefix
// index).
//
// Threads: any thread may call anything; two threads inside one sequence get BusyError. `mutex_`
// guards the table of slots and the spans of free slots; the spans of a live slot belong to whoever
// holds its sequence's claim. Order: a claim may be held when `mutex_` is taken, never the other
// way round (reclamation, which holds `mutex_`, only tries claims); no frames are taken under
// `mutex_`.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/layout.hpp"
#include "cache/mapper_log.hpp"
#include "cache/prefix_index.hpp"
#include "cache/sequence_state.hpp"
#include "cache/slot_lists.hpp"
#include "cache/space.hpp"
#include "span/background.hpp"
#include "span/frame_store.hpp"

namespace kvspan {

class Sequence;
class Batch;

struct CacheOptions {
  std::vector<LayerSpec> layers;
  std::int32_t max_seqs = 1;
  Tokens max_seq_len;
  std::int32_t layers_per_page = 0;  // 0: automatic
  bool split_planes = false;
  std::optional<Tokens>
      overread;  // none: 0 where unmapped parts read as zeros, else a kernel's tile
  Unmapped unmapped = Unmapped::zero;
  // With Unmapped::zero: how many positions of a slot kernels may read whatever its length. Needed
  // where zeros have to be mapped; elsewhere all of the slot reads as zeros.
  std::optional<Tokens> static_len{};
  Scrub scrub = Scrub::cross;
  std::optional<Bytes> keep;  // the most that is kept mapped for later; none: see keep_limit
};

// All in bytes as page tables show them: mapped = used + partial + ahead + kept. `prefix` is what
// the prefix index holds. Of mapped and prefix together, `shared` counts frames that are counted
// already. `zeros` are the frames of zeros, which count as no page's.
struct CacheFigures {
  Bytes reserved, mapped, used, partial, ahead, kept, shared, prefix, zeros;
  std::uint64_t n_grown_late = 0;  // calls that had to map pages themselves, or wait for the mapper
  std::int32_t n_sequences = 0, n_slots = 0;
  PrefixFigures prefixes;
  Bytes merged;  // of frames that were computed twice, and given back
};

// One page of the page map, for pictures and debugging.
struct MappedPage {
  SlotId slot;
  std::size_t lane;
  Pages page;
  FrameId frame;
  std::uint32_t references;
};

class Cache final : public Reclaimer, public Worker, public std::enable_shared_from_this<Cache> {
 public:
  static std::shared_ptr<Cache> make(std::shared_ptr<FrameStore> store,
                                     const CacheOptions& options);
  ~Cache();

  // A new empty sequence in the free slot whose pages fit `expected` tokens best. The mapper maps
  // them piece by piece, as they come.
  // What is queued on `stream` comes after the work that may still use that slot.
  std::shared_ptr<Sequence> sequence(Tokens expected, Stream stream = {});
  // One that begins with as many of `tokens` as the prefix index knows under this salt, but for the
  // last: its length says how many. All of them are expected, at least.
  std::shared_ptr<Sequence> sequence(std::span<const std::int32_t> tokens, std::string salt,
                                     Tokens expected, Stream stream = {});
  // Sequence i becomes what sequence parents[i] was: its pages, moved or shared as by a fork.
  void reorder(std::span<const std::shared_ptr<Sequence>> sequences,
               std::span<const std::int32_t> parents, Stream stream = {});
  std::shared_ptr<Batch> batch(std::vector<std::shared_ptr<Sequence>> sequences,
                               Stream stream = {});
  // `n` new sequences in adjacent slots.
  std::shared_ptr<Batch> adjacent_batch(std::int32_t n, Stream stream = {});

  // Unmaps every page that no live token needs. Returns the bytes that nobody references any more.
  Bytes trim();
  // Ends the API of the cache and its sequences. The memory lives as long as a tensor shows it.
  void close();

  CacheFigures figures() const;
  std::vector<MappedPage> page_map() const;
  std::vector<MapperEvent> mapper_events() const { return mapper_log_.events(); }
  // Of the sequence in each slot; 0 where there is none.
  std::vector<Tokens> lengths() const;
  const CallCounters& calls() const;
  // The space, for making tensors. Throws ReleasedError after close.
  std::shared_ptr<Space> space() const;

  Pages reclaim(Pages wanted, Reach reach) noexcept override;
  Pages reclaimable() const noexcept override;

  // Maps the next pages of a sequence that will need them soon, or unmaps some of those that are
  // kept and too many (mapper.cpp).
  WorkDone work_ahead(TimePoint now) noexcept override;

 private:
  friend class Sequence;
  friend class Batch;

  struct Slot {
    std::shared_ptr<SequenceState> live;  // none: no sequence in it
    bool is_leased = false;               // by a batch of adjacent slots; if not live, empty
    bool is_retired = false;              // the driver failed on it: never used again
    Fence fence;                          // behind the work that may still use pages to be unmapped
    Pages backed;                         // as of the last update_mapped
    Pages kept;                           // of these, counted in kept_ (see list)

    bool is_free() const { return live == nullptr && !is_leased && !is_retired; }
  };

  Cache(std::shared_ptr<FrameStore> store, const CacheOptions& options);

  void check_usable() const;
  static void check_expected(Tokens expected);

  // The table of slots (slots.cpp). All under mutex_, unless they say otherwise.
  void check_open() const;
  Slot& slot(SlotId id) { return slots_[static_cast<std::size_t>(id.value)]; }
  const Slot& slot(SlotId id) const { return slots_[static_cast<std::size_t>(id.value)]; }
  SlotId best_free_slot(Tokens expected) const;
  SlotId emptiest_free_slot() const;
  SlotId adjacent_free_slots(std::int32_t n) const;
  [[noreturn]] void throw_no_slot(std::int32_t n) const;
  std::shared_ptr<SequenceState> occupy(SlotId id);
  void announce(SequenceState& state, Tokens expected) const noexcept;
  void prepare(SequenceState& state, Stream stream);        // not under mutex_
  void vacate(SequenceState& state, Fence fence) noexcept;  // takes mutex_
  bool is_settled(SlotId id) const;
  void settle(SlotId id);
  Fence fence_behind(SlotId id, Stream stream);  // and behind what the slot waits for already
  bool fence_again(SequenceState& state) noexcept;
  void follow(SequenceState& state, Stream stream);
  void update_mapped(SlotId id);
  void list(SlotId id) noexcept;
  bool is_memory_ample() const;  // not under mutex_ either
  Pages keep_limit() const;
  void limit_kept() noexcept;
  struct Dropped {
    SlotId slot{};
    Pages unmapped{};
    Pages freed{};  // of these, what nobody else holds
  };
  Dropped drop_excess(std::uint32_t n_frames) noexcept;
  Dropped drop_kept(Pages wanted, std::uint32_t n_frames, bool waits) noexcept;
  Pages drop_surplus(SlotId id, Tokens keep, std::uint32_t n_frames, bool waits) noexcept;
  Tokens tokens_before_last(SlotId id, std::uint32_t n_frames) const;
  Pages drop_tail(SlotId id, Tokens keep) noexcept;
  Tokens tokens_in(Pages pages) const;
  Pages needed_pages(const SequenceState& state) const;
  // Those, what was mapped ahead, and what was announced.
  Pages planned_pages(const SequenceState& state) const;
  Tokens planned_tokens(const SequenceState& state) const;
  Pages pages_at(const SequenceState& state, Tokens length) const;
  void note_ahead(SequenceState& state);

  // Growing and shrinking (growth.cpp). All under the claims of the sequences.
  void extend(SequenceState& state, Tokens n, Stream stream);
  void truncate(SequenceState& state, Tokens n, Stream stream);
  void drop_before(SequenceState& state, Tokens position, Stream stream);
  void release(SequenceState& state, Stream stream);
  void grow(std::span<SequenceState* const> states, Tokens n, Stream stream);
  void note_grown(std::span<SequenceState* const> states);  // once the lengths are what they are
  bool try_grow(std::span<SequenceState* const> states, Tokens n, Stream stream, Effort effort);
  void plan_growth(Edit& edit, const SequenceState& state, Tokens n, Stream stream, Effort effort);
  // The end of the stride in which a lane's pages for `until` tokens are.
  Pages stride_end(const SequenceState& state, std::size_t lane, Tokens until, bool is_ample) const;
  // The mapper's (mapper.cpp).
  struct Growing {
    std::shared_ptr<SequenceState> state;
    Tokens until;  // there should be room
  };
  bool find_growing(TimePoint now);
  bool map_next(const Growing& growing, TimePoint now) noexcept;
  bool unmap_kept(TimePoint now) noexcept;
  void drop_shared(SlotId id, Tokens keep) noexcept;
  void update_capacity(SequenceState& state);
  void commit(Edit& edit);

  // Sequences from sequences (fork.cpp).
  std::vector<std::shared_ptr<Sequence>> fork(SequenceState& parent, std::int32_t n, Tokens length,
                                              Stream stream);
  // `from_after`: the slot in which the pages of `from` are once the edit is done.
  void plan_copy(Edit& edit, SlotId from, SlotId from_after, SlotId to, Tokens length);
  void plan_move(Edit& edit, std::optional<SlotId> from, SlotId to);
  void begin_as(SequenceState& state, SequenceState& parent, Tokens length, Stream stream);
  void leave(SequenceState& state) noexcept;  // one that did not get what it was to begin with

  // The prefix index (prefix.cpp).
  Tokens publish(SequenceState& state, std::span<const std::int32_t> tokens, bool merges,
                 Stream stream);
  void merge(SequenceState& state, std::span<const PrefixIndex::Chunk> chunks,
             const PrefixIndex::Found& known, Stream stream);
  void plan_prefix(Edit& edit, SlotId to, const LanePages& pages, Tokens length);
  Pages evict_prefixes(Pages wanted) noexcept;

  const std::shared_ptr<FrameStore> store_;
  const std::optional<Bytes> keep_;
  PrefixIndex prefixes_{*store_};
  std::atomic<std::int64_t> mapped_pages_{0};
  std::atomic<std::int64_t> shared_pages_{0};
  std::atomic<std::uint64_t> n_grown_late_{0};  // relaxed: a figure
  std::atomic<std::uint64_t> merged_pages_{0};  // likewise
  // Of a lane, the mean of the live sequences that the background saw last. Relaxed: a rough one.
  std::atomic<std::uint32_t> mean_pages_{0};
  MapperLog mapper_log_;
  // The background's alone: those that were found to need pages soon, the most urgent last, and
  // how long it takes until they are mapped; no more is mapped before `mapping_resumes_`.
  std::vector<Growing> growing_;
  TimePoint::duration lead_{};
  Pace::Prefill prefill_;
  TimePoint mapping_resumes_{};
  TimePoint::duration backoff_{};

  mutable std::mutex mutex_;
  std::vector<Slot> slots_;
  SlotLists lists_;
  Pages kept_;  // mapped and not planned for, all slots; see list
  bool is_closed_ = false;
  std::shared_ptr<Space> space_;  // none after close
};

}  // namespace kvspan
