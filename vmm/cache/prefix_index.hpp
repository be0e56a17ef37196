// The prefix index: which frames hold the keys and values of which tokens. It is the hashed page
// table of DESIGN.md: chains of chunks, each found by a hash over its tokens and all before it,
// verified by the tokens themselves.
//
// A chunk is as many tokens as fill a page of the lane that fills slowest; its pages, in every
// lane, are those that its tokens complete. The index holds one reference to every frame that some
// chunk has a page in. Chunks that nobody maps may be evicted, the least recently used first, and
// a chunk before the one it follows.
//
// Threads: any may call anything. `mutex_` is a leaf: nothing that takes a lock is called under it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.hpp"
#include "cache/token_hash.hpp"
#include "span/frame_store.hpp"
#include "span/span.hpp"

namespace kvspan {

using LanePages = std::vector<std::vector<PageEntry>>;  // by lane, one behind the other

struct PrefixFigures {
  std::uint64_t n_hits = 0, n_misses = 0;        // sequences that began with a token, or with none
  std::uint64_t n_hit_tokens = 0;                // that all of them began with
  std::uint64_t n_published = 0, n_evicted = 0;  // chunks
  Pages held;                                    // pages of frames that the index references
};

class PrefixIndex {
 public:
  explicit PrefixIndex(FrameStore& store) : store_(store) {}
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // Pages that were found, with a reference to every frame of theirs for as long as this lives.
  class Found {
   public:
    explicit Found(FrameStore& store) : store_(&store) {}
    Found(const Found&) = delete;
    Found& operator=(const Found&) = delete;
    Found(Found&& other) noexcept = default;
    ~Found() { store_->give(pins); }

    Tokens tokens{0};  // how many of those asked for these pages begin with
    LanePages pages;   // from the first page on
    std::vector<Fence> written;
    std::vector<FrameId> pins;

   private:
    FrameStore* store_;
  };

  // The longest chain that begins like `tokens`, to the token: the last chunk may agree in part.
  // `chunk_ends` are the numbers of tokens at which chunks end, as far as there are tokens, and the
  // next after them. At most `most` tokens are found.
  Found find(const std::string& salt, std::span<const std::int32_t> tokens,
             std::span<const Tokens> chunk_ends, Tokens most);

  // For the figures: how many of the tokens that were found a sequence began with.
  void count(Tokens used);

  // What `publish` is given of one chunk, and what it found there: pages that were known already.
  struct Chunk {
    std::span<const std::int32_t> tokens;
    LanePages pages;
  };

  // Makes a chain known, from its first chunk on. Returns references to the frames of those chunks
  // that were known already. `new_pages`: pages of frames that the index did not hold before.
  Found publish(const std::string& salt, std::span<Chunk> chunks, Fence written, Pages& new_pages);

  // Forgets chunks until `wanted` pages are free, or all are gone that only the index references:
  // first those that nobody maps, then those of which a part is mapped, and what follows them.
  // Returns the pages that nobody references any more; `let_go` counts those that it held.
  Pages evict(Pages wanted, Pages& let_go) noexcept;
  // Pages that only the index references.
  Pages evictable() const noexcept;
  // Forgets everything.
  void clear() noexcept;

  PrefixFigures figures() const;

 private:
  struct Node {
    Node* parent = nullptr;             // a root has none
    const std::string* salt = nullptr;  // of a root
    TokenHash hash;
    std::vector<std::int32_t> tokens;
    LanePages pages;
    Fence written;
    std::vector<Node*> children;         // in the order of their tokens
    std::list<Node*>::iterator place{};  // in recent_; not of a root
  };

  Node* child(Node& parent, std::span<const std::int32_t> tokens) const;
  static Node* nearest_child(const Node& parent, std::span<const std::int32_t> tokens);
  Node& add(Node& parent, const Chunk& chunk, Fence written, Pages& new_pages);
  void touch(Node* node);
  bool is_mapped(const Node& node) const;
  // Whether it or a chunk before it has a frame that only the index references.
  bool follows_unmapped(const Node& node) const;
  Pages remove(Node& node) noexcept;
  void append(const Node& node, Found& found) const;

  FrameStore& store_;
  mutable std::mutex mutex_;
  std::unordered_map<std::string, std::unique_ptr<Node>> roots_;  // by salt
  std::unordered_map<TokenHash, std::unique_ptr<Node>, TokenHash::Hasher> nodes_;
  // The most recently used first. Whoever uses a chunk uses those before it, so every chunk stands
  // behind the one that it follows, and the last is followed by none.
  std::list<Node*> recent_;
  std::unordered_map<FrameId, std::uint32_t> users_;  // how many chunks have pages in a frame
  PrefixFigures figures_;
};

}  // namespace kvspan
