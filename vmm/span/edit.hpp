// An edit: one all-or-nothing change to the page tables and mappings of any number of spans.
//
// Planning (`back`, `own`, `place`, `copy`, `drop`) touches nothing. `commit` takes the frames,
// maps, copies and unmaps in the order that is easiest to take back, and publishes the page tables
// when nothing can fail any more. If anything throws before that, the mappings, tables and
// reference counts are as they were. Should the undoing itself fail (the driver refuses to map what
// was mapped a moment ago), the span is marked broken and the error says so.
//
// Patches of one edit must not overlap. Adjacent frames under adjacent pages are mapped by one
// call. Threads: an edit is one thread's; the spans in it must be in that thread's hands.
#pragma once

#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "span/frame_store.hpp"
#include "span/span.hpp"

namespace kvspan {

class Edit {
 public:
  // `account` counts the driver calls of this edit beside the backend's own counters.
  Edit(FrameStore& store, CallCounters& account, Stream stream, Effort effort = Effort::all)
      : store_(store), account_(account), stream_(stream), effort_(effort) {}

  // Backs every unbacked page of `range` with new frames.
  void back(Span& span, PageRange range, OwnerTag owner, bool always_scrub);

  // Copy-on-write: gives `span` frames of its own for the pages of `range` that it shares, with the
  // first `live` bytes, counted from the start of `range`, as they were. Frames that hold no live
  // byte are exchanged without a copy.
  void own(Span& span, PageRange range, Bytes live, OwnerTag owner, bool always_scrub);

  // Puts `entries` in place of what is there from `first` on: whole frames of other spans, which
  // get one more reference; wanted pages, which get new frames; or unbacked pages. Pages that hold
  // the same already are left alone.
  void place(Span& span, Pages first, std::span<const PageEntry> entries, OwnerTag owner,
             bool always_scrub);

  // Copies bytes once everything is mapped. Both places are addresses after the edit.
  void copy(Address to, Address from, Bytes size) { copies_.push_back({to, from, size}); }

  // The same from a place in a frame that need not be mapped anywhere; the caller holds a reference
  // to it.
  void copy_from(Address to, FrameId frame, Bytes offset, Bytes size) {
    loads_.push_back({to, frame, offset, size});
  }

  // Unbacks the frames that lie whole in `range`.
  void drop(Span& span, PageRange range);

  // Maps the zeros of a span in which nothing is mapped yet. From then on every edit keeps them
  // wherever the span's window is not backed.
  void show_zeros(Span& span) { add(span, {Pages(0), span.window()}, {}, Bytes(0)); }

  bool is_empty() const { return patches_.empty() && copies_.empty() && loads_.empty(); }

  void commit();

  // After commit: how many pages of sharing it added (by `place`) less those it ended (a frame
  // given back that others still hold).
  std::int64_t shared_pages() const { return shared_pages_; }
  // And whether it left work on the stream that must be done before another stream comes here.
  bool has_queued_work() const { return has_queued_work_; }

 private:
  class Window;

  // What is to stand in `range`, and what stands there: entries[i] for page range.first + i.
  struct Patch {
    Span* span;
    PageRange range;
    std::vector<PageEntry> old{};  // empty when no page is mapped
    std::vector<PageEntry>
        now{};     // empty when no page is to be; wanted pages until frames are taken
    Bytes live{};  // leading bytes of `old` that are copied over
    std::size_t first_taken = 0;
    // How far a commit has come, in pages from range.first; for the undoing.
    Pages unmapped{}, mapped{};
  };
  struct Copy {
    Address to, from;
    Bytes size;
  };

  struct Load {
    Address to;
    FrameId frame;
    Bytes offset, size;
  };

  // `now` has an entry for each page of the range, or none at all: nothing is to back them.
  void add(Span& span, PageRange range, std::span<const PageEntry> now, Bytes live);
  void add_fresh(Span& span, PageRange range, Bytes live, OwnerTag owner, bool always_scrub);
  void assign_frames();
  void add_references();
  void prepare_publishing();
  void apply(Patch& patch);
  void copy_live(const Patch& patch);
  void scrub(const Patch& patch, Address at);
  void publish() noexcept;
  void undo() noexcept;
  void undo(Patch& patch) noexcept;
  void copy_bytes(Address to, Address from, Bytes size);

  // Both work through the entries in order and keep count of what is done, should they throw.
  void map(Address at, std::span<const PageEntry> entries, Pages& done);
  void unmap(Address at, std::span<const PageEntry> entries, Pages& done);

  FrameStore& store_;
  CallCounters& account_;
  const Stream stream_;
  const Effort effort_;
  std::vector<Patch> patches_;
  std::vector<Copy> copies_;
  std::vector<Load> loads_;
  std::vector<FrameStore::Gap> gaps_;  // one a run of wanted pages, in order

  std::vector<FrameStore::Taken> taken_;
  std::vector<FrameId> referenced_;  // placed frames, each with the reference it got
  std::vector<FrameId> given_;       // frames of `old`, to be given back on publishing
  std::int64_t shared_pages_ = 0;
  bool has_queued_work_ = false;
};

}  // namespace kvspan
