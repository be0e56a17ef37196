// A plain model of what a backend has been told, and the strictest reading of the contract: what
// CUDA's driver refuses or leaves undefined is a violation here, also where the host would do it.
// Not thread-safe: its user locks.
#pragma once

#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

class MappingModel {
 public:
  explicit MappingModel(Bytes page_size) : page_size_(page_size) {}

  const std::vector<std::string>& violations() const { return violations_; }
  std::size_t mappings() const { return mappings_.size(); }
  std::size_t frames() const { return frames_.size(); }
  std::size_t reservations() const { return reservations_.size(); }

  // Each `check` comes before the call and each `did` after it went well.
  void check_reserve(Bytes size) {
    if (size == Bytes(0) || size.value % page_size_.value != 0) violation("reserve: odd size");
  }
  void did_reserve(VirtualRange r) { reservations_[r.base] = r.size; }

  void check_free(VirtualRange r) {
    const auto it = reservations_.find(r.base);
    if (it == reservations_.end() || it->second != r.size) violation("free: no such reservation");
    if (any_mapped(r)) violation("free: pages are still mapped");
  }
  void did_free(VirtualRange r) { reservations_.erase(r.base); }

  void check_create(FrameRun run) {
    each(run, [&](FrameId f) {
      if (frames_.contains(f)) violation("create: frame " + name(f) + " exists");
    });
  }
  void did_create(FrameRun run) {
    each(run, [&](FrameId f) { frames_[f] = 0; });
  }

  void check_export(FrameId f) {
    if (!frames_.contains(f)) violation("export: frame " + name(f) + " does not exist");
  }

  void check_release(FrameRun run) {
    each(run, [&](FrameId f) {
      const auto it = frames_.find(f);
      if (it == frames_.end()) violation("release: frame " + name(f) + " does not exist");
      if (it != frames_.end() && it->second > 0)
        violation("release: frame " + name(f) + " is mapped");
    });
  }
  void did_release(FrameRun run) {
    each(run, [&](FrameId f) { frames_.erase(f); });
  }

  void check_map(Address at, FrameRun run) {
    const VirtualRange r{at, size_of(run.pages(), page_size_)};
    each(run, [&](FrameId f) {
      if (!frames_.contains(f)) violation("map: frame " + name(f) + " does not exist");
    });
    if (at.value % page_size_.value != 0) violation("map: not at a page");
    if (!is_reserved(r)) violation("map: not in a reservation");
    if (any_mapped(r)) violation("map: pages are mapped already");
  }
  void did_map(Address at, FrameRun run, Access access) {
    each(run, [&](FrameId f) {
      const Bytes size = size_of(pages_of(f.size_class()), page_size_);
      mappings_[at] = {f, size, access};
      ++frames_[f];
      at = at + size;
    });
  }

  void check_set_access(VirtualRange r) { check_whole_frames("set_access", r); }
  void did_set_access(VirtualRange r, Access access) {
    for (auto it = mappings_.lower_bound(r.base); it != mappings_.end() && it->first < r.end();
         ++it) {
      it->second.access = access;
    }
  }

  void check_unmap(VirtualRange r, std::uint32_t handles) {
    const std::uint32_t n = check_whole_frames("unmap", r);
    if (n != handles) {
      violation("unmap: told of " + std::to_string(handles) + " frames, there are " +
                std::to_string(n));
    }
  }
  void did_unmap(VirtualRange r) {
    auto it = mappings_.lower_bound(r.base);
    while (it != mappings_.end() && it->first < r.end()) {
      const auto f = frames_.find(it->second.frame);
      if (f != frames_.end() && f->second > 0) --f->second;
      it = mappings_.erase(it);
    }
  }

  void check_read(const char* call, Address at, Bytes size) {
    if (!all_mapped({at, size}, Access::read))
      violation(std::string(call) + ": reads unbacked bytes");
  }
  void check_write(const char* call, Address at, Bytes size) {
    if (!all_mapped({at, size}, Access::read_write)) {
      violation(std::string(call) + ": writes bytes that are unbacked or not writable");
    }
  }
  void check_apart(Address a, Address b, Bytes size) {
    if (a < b + size && b < a + size) violation("copy: the ranges overlap");
  }
  void violation(std::string what) { violations_.push_back(std::move(what)); }

 private:
  struct Mapping {
    FrameId frame;
    Bytes size;
    Access access;
  };
  using Mappings = std::map<Address, Mapping>;

  template <class F>
  static void each(FrameRun run, F f) {
    for (std::uint32_t i = 0; i < run.count; ++i) f(run.first.next(i));
  }
  static std::string name(FrameId f) {
    return std::to_string(f.size_class().value) + "/" + std::to_string(f.index());
  }
  static Address end_of(const Mappings::value_type& m) { return m.first + m.second.size; }

  // The first mapping that ends behind `at`.
  Mappings::const_iterator first_behind(Address at) const {
    auto it = mappings_.upper_bound(at);
    if (it != mappings_.begin() && end_of(*std::prev(it)) > at) --it;
    return it;
  }
  bool any_mapped(VirtualRange r) const {
    const auto it = first_behind(r.base);
    return it != mappings_.end() && it->first < r.end();
  }
  bool all_mapped(VirtualRange r, Access least) const {
    Address at = r.base;
    for (auto it = first_behind(at); at < r.end(); ++it) {
      if (it == mappings_.end() || it->first > at || it->second.access < least) return false;
      at = end_of(*it);
    }
    return true;
  }
  bool is_reserved(VirtualRange r) const {
    auto it = reservations_.upper_bound(r.base);
    if (it == reservations_.begin()) return false;
    --it;
    return r.end() <= it->first + it->second;
  }
  // How many frames the range has.
  std::uint32_t check_whole_frames(const std::string& call, VirtualRange r) {
    Address at = r.base;
    std::uint32_t n = 0;
    for (auto it = first_behind(at); at < r.end(); ++it, ++n) {
      if (it == mappings_.end() || it->first > at) {
        violation(call + ": pages of the range are unbacked");
        return n;
      }
      if (it->first < at) violation(call + ": begins inside a frame");
      at = end_of(*it);
    }
    if (at > r.end()) violation(call + ": ends inside a frame");
    return n;
  }

  Bytes page_size_;
  std::map<Address, Bytes> reservations_;
  std::map<FrameId, std::uint32_t> frames_;  // how often each is mapped
  Mappings mappings_;                        // one a frame, also where a run was mapped by one call
  std::vector<std::string> violations_;
};

}  // namespace kvspan::test
