#include "cache/prefix_index.hpp"

#include <algorithm>

namespace kvspan {

namespace {

std::size_t n_agreeing(std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
  return static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

// The frames in which a chunk has pages, each once: a frame's pages follow each other in a lane.
template <class F>
void for_each_frame(const LanePages& pages, F f) {
  for (const auto& lane : pages) {
    FrameId last;
    for (const PageEntry& entry : lane) {
      if (entry.frame != last) f(entry.frame);
      last = entry.frame;
    }
  }
}

template <class F>
bool any_frame(const LanePages& pages, F f) {
  bool is_any = false;
  for_each_frame(pages, [&](FrameId frame) { is_any = is_any || f(frame); });
  return is_any;
}

}  // namespace

PrefixIndex::Found PrefixIndex::find(const std::string& salt, std::span<const std::int32_t> tokens,
                                     std::span<const Tokens> chunk_ends, Tokens most) {
  Found found(store_);
  const std::scoped_lock lock(mutex_);
  const auto root = roots_.find(salt);
  Node* last = root == roots_.end() ? nullptr : root->second.get();
  std::size_t begin = 0;
  for (const Tokens end : chunk_ends) {
    if (last == nullptr) break;
    const auto rest = tokens.subspan(begin);
    const auto size = static_cast<std::size_t>(end.value) - begin;
    Node* next = size <= rest.size() ? child(*last, rest.first(size)) : nullptr;
    if (next == nullptr) {
      next = nearest_child(*last, rest);
      const std::size_t n = next == nullptr ? 0 : n_agreeing(next->tokens, rest);
      // One that does not agree at all still has the rest of a token that straddles out of the last
      // chunk.
      if (next == nullptr || begin + n == 0) break;
      append(*next, found);
      last = next;
      begin += n;
      break;
    }
    append(*next, found);
    last = next;
    begin += size;
  }
  found.tokens = std::min(Tokens(static_cast<std::int64_t>(begin)), most);
  if (last != nullptr) touch(last);
  return found;
}

void PrefixIndex::count(Tokens used) {
  const std::scoped_lock lock(mutex_);
  ++(used > Tokens(0) ? figures_.n_hits : figures_.n_misses);
  figures_.n_hit_tokens += static_cast<std::uint64_t>(used.value);
}

PrefixIndex::Found PrefixIndex::publish(const std::string& salt, std::span<Chunk> chunks,
                                        Fence written, Pages& new_pages) {
  Found known(store_);
  const std::scoped_lock lock(mutex_);
  const auto at = roots_.try_emplace(salt).first;
  if (!at->second) {
    at->second = std::make_unique<Node>();
    at->second->salt = &at->first;
    at->second->hash = TokenHash::of(salt);
  }
  Node* last = at->second.get();
  for (Chunk& chunk : chunks) {
    if (Node* node = child(*last, chunk.tokens)) {
      if (chunk.pages != node->pages) {
        chunk.pages = node->pages;
        append(*node, known);
      }
      last = node;
    } else if (nodes_.contains(last->hash.then(chunk.tokens))) {
      break;  // a hash that two chains share serves the first
    } else {
      last = &add(*last, chunk, written, new_pages);
    }
  }
  touch(last);
  return known;
}

PrefixIndex::Node* PrefixIndex::child(Node& parent, std::span<const std::int32_t> tokens) const {
  const auto found = nodes_.find(parent.hash.then(tokens));
  if (found == nodes_.end()) return nullptr;
  Node* const node = found->second.get();
  return node->parent == &parent && std::ranges::equal(node->tokens, tokens) ? node : nullptr;
}

PrefixIndex::Node* PrefixIndex::nearest_child(const Node& parent,
                                              std::span<const std::int32_t> tokens) {
  // What agrees longest stands beside the place where the tokens would.
  const auto& all = parent.children;
  const auto behind = std::ranges::partition_point(all, [&](const Node* node) {
    return std::ranges::lexicographical_compare(node->tokens, tokens);
  });
  if (behind == all.begin()) return all.empty() ? nullptr : all.front();
  Node* const before = *std::prev(behind);
  if (behind == all.end()) return before;
  const bool is_behind = n_agreeing((*behind)->tokens, tokens) > n_agreeing(before->tokens, tokens);
  return is_behind ? *behind : before;
}

PrefixIndex::Node& PrefixIndex::add(Node& parent, const Chunk& chunk, Fence written,
                                    Pages& new_pages) {
  auto made = std::make_unique<Node>();
  Node& node = *made;
  node.parent = &parent;
  node.hash = parent.hash.then(chunk.tokens);
  node.tokens.assign(chunk.tokens.begin(), chunk.tokens.end());
  node.pages = chunk.pages;
  node.written = written;
  std::list<Node*> place{&node};
  parent.children.reserve(parent.children.size() + 1);
  for_each_frame(node.pages, [&](FrameId frame) { users_.try_emplace(frame, 0u); });
  nodes_.emplace(node.hash, std::move(made));

  // From here on nothing allocates.
  const bool is_first = parent.parent == nullptr;
  node.place = place.begin();
  recent_.splice(is_first ? recent_.begin() : std::next(parent.place), place);
  parent.children.insert(
      std::ranges::partition_point(parent.children,
                                   [&](const Node* other) { return other->tokens < node.tokens; }),
      &node);
  for_each_frame(node.pages, [&](FrameId frame) {
    if (users_[frame]++ > 0) return;
    store_.share(frame);
    new_pages += pages_of(frame.size_class());
    figures_.held += pages_of(frame.size_class());
  });
  ++figures_.n_published;
  return node;
}

void PrefixIndex::touch(Node* node) {
  for (; node->parent != nullptr; node = node->parent) {
    recent_.splice(recent_.begin(), recent_, node->place);
  }
}

void PrefixIndex::append(const Node& node, Found& found) const {
  found.pages.resize(node.pages.size());
  for (std::size_t lane = 0; lane < node.pages.size(); ++lane) {
    auto& pages = found.pages[lane];
    pages.insert(pages.end(), node.pages[lane].begin(), node.pages[lane].end());
  }
  found.written.push_back(node.written);
  for_each_frame(node.pages, [&](FrameId frame) {
    found.pins.reserve(found.pins.size() + 1);
    store_.share(frame);
    found.pins.push_back(frame);
  });
}

bool PrefixIndex::is_mapped(const Node& node) const {
  return any_frame(node.pages, [&](FrameId frame) { return store_.references(frame) > 1; });
}

bool PrefixIndex::follows_unmapped(const Node& node) const {
  const auto is_unmapped = [&](FrameId frame) { return store_.references(frame) == 1; };
  for (const Node* one = &node; one->parent != nullptr; one = one->parent) {
    if (any_frame(one->pages, is_unmapped)) return true;
  }
  return false;
}

Pages PrefixIndex::remove(Node& node) noexcept {
  Pages freed{};
  for_each_frame(node.pages, [&](FrameId frame) {
    const auto users = users_.find(frame);
    if (--users->second > 0) return;
    users_.erase(users);
    figures_.held -= pages_of(frame.size_class());
    freed += store_.give({&frame, 1});
  });
  Node& parent = *node.parent;
  std::erase(parent.children, &node);
  if (parent.salt != nullptr && parent.children.empty()) roots_.erase(roots_.find(*parent.salt));
  recent_.erase(node.place);
  nodes_.erase(TokenHash(node.hash));
  ++figures_.n_evicted;
  return freed;
}

Pages PrefixIndex::evict(Pages wanted, Pages& let_go) noexcept {
  Pages freed{};
  const std::scoped_lock lock(mutex_);
  const Pages before = figures_.held;
  // What is mapped counts as used just now; each chunk is looked at once.
  for (std::size_t left = recent_.size(); left > 0 && freed < wanted; --left) {
    Node& node = *recent_.back();
    if (is_mapped(node)) {
      touch(&node);
    } else {
      freed += remove(node);
    }
  }
  // Of a chunk that is mapped in part, such as without the pages that windows left, the rest goes
  // at last, and for it the chunks that follow: from the ends of chains, which stand behind.
  for (auto place = recent_.end(); place != recent_.begin() && freed < wanted;) {
    Node& node = **std::prev(place);
    if (node.children.empty() && follows_unmapped(node)) {
      freed += remove(node);
    } else {
      --place;
    }
  }
  let_go = before - figures_.held;
  return freed;
}

Pages PrefixIndex::evictable() const noexcept {
  const std::scoped_lock lock(mutex_);
  Pages pages{};
  for (const auto& [frame, n] : users_) {
    if (store_.references(frame) == 1) pages += pages_of(frame.size_class());
  }
  return pages;
}

void PrefixIndex::clear() noexcept {
  const std::scoped_lock lock(mutex_);
  for (const auto& [frame, n] : users_) store_.give({&frame, 1});
  users_.clear();
  recent_.clear();
  nodes_.clear();
  roots_.clear();
  figures_.held = Pages(0);
}

PrefixFigures PrefixIndex::figures() const {
  const std::scoped_lock lock(mutex_);
  return figures_;
}

}  // namespace kvspan
