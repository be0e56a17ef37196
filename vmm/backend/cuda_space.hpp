// Address space of a GPU and what is mapped into it: reservations, mappings of whole handles, and
// the access that our device and its peers have to them.
//
// Mappings are counted here, because a context takes only so many.
//
// Threads: everything may be called from any thread, with the context current.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda_context.hpp"

namespace kvspan::cuda {

using Handle = CUmemGenericAllocationHandle;

class Space {
 public:
  // `devices` are granted access to what is mapped: our own and its peers.
  Space(const Context& context, Bytes page_size, const std::vector<int>& devices,
        std::uint64_t max_mappings);
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
  ~Space();

  // Throws CapacityError, DriverError.
  VirtualRange reserve(Bytes size, Bytes alignment);
  void free(VirtualRange range) noexcept;
  // Throws InvalidArgument unless the range lies in a reservation, at a page.
  void require_reserved(VirtualRange range) const;

  // Maps handles of `size` bytes each, one behind the other; all or none.
  void map(Address at, Bytes size, std::span<const Handle> handles, Access access);
  void set_access(VirtualRange range, Access access);
  void unmap(VirtualRange range, std::uint32_t n_handles);

 private:
  void charge(std::uint64_t n);
  // Takes back the first mappings of a map that failed.
  void roll_back(Address at, Bytes size, std::uint32_t n_mapped) noexcept;
  [[noreturn]] void throw_full(const char* call) const;

  const Context& context_;
  const Driver& api_;
  const Bytes page_size_;
  const std::vector<int> devices_;
  const std::uint64_t max_mappings_;
  std::atomic<std::uint64_t> n_mappings_{0};  // relaxed: a budget, it orders nothing

  mutable std::mutex mutex_;                      // guards what follows
  std::map<std::uintptr_t, Bytes> reservations_;  // by base
};

}  // namespace kvspan::cuda
