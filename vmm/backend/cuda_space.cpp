#include "backend/cuda_space.hpp"

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

namespace {

CUdeviceptr pointer(Address at) { return static_cast<CUdeviceptr>(at.value); }

CUmemAccess_flags flags_of(Access access) {
  switch (access) {
    case Access::none:
      return CU_MEM_ACCESS_FLAGS_PROT_NONE;
    case Access::read:
      return CU_MEM_ACCESS_FLAGS_PROT_READ;
    case Access::read_write:
      return CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  return CU_MEM_ACCESS_FLAGS_PROT_NONE;
}

}  // namespace

Space::Space(const Context& context, Bytes page_size, const std::vector<int>& devices,
             std::uint64_t max_mappings)
    : context_(context),
      api_(context.api()),
      page_size_(page_size),
      devices_(devices),
      max_mappings_(max_mappings) {}

Space::~Space() {
  const Current current(context_, std::nothrow);
  for (const auto& [base, size] : reservations_) {
    context_.report_unless(api_.cuMemAddressFree(static_cast<CUdeviceptr>(base), size.value));
  }
}

VirtualRange Space::reserve(Bytes size, Bytes alignment) {
  // The driver gives a base, and the map wants it as a key: so a node is made outside of the map.
  std::map<std::uintptr_t, Bytes> made{{0, size}};
  auto node = made.extract(made.begin());
  CUdeviceptr base = 0;
  const CUresult result = api_.cuMemAddressReserve(&base, size.value, alignment.value, 0, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw CapacityError("the driver has no address space left for " + to_string(size) +
                        ": lower max_seqs or max_seq_len");
  }
  check(api_, result, "cuMemAddressReserve", "cannot reserve " + to_string(size));
  node.key() = static_cast<std::uintptr_t>(base);
  const std::scoped_lock lock(mutex_);
  reservations_.insert(std::move(node));
  return {Address(static_cast<std::uintptr_t>(base)), size};
}

void Space::free(VirtualRange range) noexcept {
  {
    const std::scoped_lock lock(mutex_);
    const auto it = reservations_.find(range.base.value);
    if (it == reservations_.end() || it->second != range.size) {
      context_.report_unless(CUDA_ERROR_INVALID_VALUE);
      return;
    }
    reservations_.erase(it);  // before: another thread may be given the range at once
  }
  context_.report_unless(api_.cuMemAddressFree(pointer(range.base), range.size.value));
}

void Space::require_reserved(VirtualRange range) const {
  const std::scoped_lock lock(mutex_);
  auto next = reservations_.upper_bound(range.base.value);
  const bool is_inside = next != reservations_.begin() &&
                         range.end().value <= (--next)->first + next->second.value &&
                         range.base.value % page_size_.value == 0;
  if (!is_inside) {
    throw InvalidArgument("the range of " + to_string(range.size) +
                          " is no part of a reservation of this pool's, or begins inside a page");
  }
}

void Space::throw_full(const char* call) const {
  throw CapacityError(std::string(call) + ": the driver has no room for another mapping, with " +
                      std::to_string(n_mappings_.load(std::memory_order_relaxed)) +
                      " live ones; use a larger page_size or max_frame_size, or shorter or fewer "
                      "sequences at a time");
}

void Space::charge(std::uint64_t n) {
  const std::uint64_t live = n_mappings_.fetch_add(n, std::memory_order_relaxed);
  if (live + n <= max_mappings_) return;
  n_mappings_.fetch_sub(n, std::memory_order_relaxed);
  throw CapacityError("cannot map " + std::to_string(n) + " more frames: " + std::to_string(live) +
                      " are mapped, and max_mappings is " + std::to_string(max_mappings_) +
                      " (a CUDA context fails somewhat above half a million); use a larger "
                      "page_size or max_frame_size, or shorter or fewer sequences at a time");
}

void Space::map(Address at, Bytes size, std::span<const Handle> handles, Access access) {
  const auto n = static_cast<std::uint32_t>(handles.size());
  charge(n);
  std::uint32_t n_mapped = 0;
  try {
    for (; n_mapped < n; ++n_mapped) {
      const CUresult result =
          api_.cuMemMap(pointer(at + size * n_mapped), size.value, 0, handles[n_mapped], 0);
      if (result == CUDA_ERROR_OUT_OF_MEMORY) throw_full("cuMemMap");
      check(api_, result, "cuMemMap",
            "cannot map frame " + std::to_string(n_mapped) + " of " + std::to_string(n) + ", of " +
                to_string(size) + " each");
    }
    if (access != Access::none) set_access({at, size * n}, access);
  } catch (...) {
    n_mappings_.fetch_sub(n - n_mapped, std::memory_order_relaxed);
    roll_back(at, size, n_mapped);
    throw;
  }
}

void Space::roll_back(Address at, Bytes size, std::uint32_t n_mapped) noexcept {
  if (n_mapped == 0) return;
  const CUresult result = api_.cuMemUnmap(pointer(at), size.value * n_mapped);
  context_.report_unless(result);
  if (result == CUDA_SUCCESS) n_mappings_.fetch_sub(n_mapped, std::memory_order_relaxed);
}

void Space::set_access(VirtualRange range, Access access) {
  std::vector<CUmemAccessDesc> grants;
  for (const int device : devices_) {
    CUmemAccessDesc grant{};
    grant.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    grant.location.id = device;
    grant.flags = flags_of(access);
    grants.push_back(grant);
  }
  const CUresult result =
      api_.cuMemSetAccess(pointer(range.base), range.size.value, grants.data(), grants.size());
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw_full("cuMemSetAccess");
  check(api_, result, "cuMemSetAccess", "cannot grant access to " + to_string(range.size));
}

void Space::unmap(VirtualRange range, std::uint32_t n_handles) {
  check(api_, api_.cuMemUnmap(pointer(range.base), range.size.value), "cuMemUnmap",
        "cannot unmap " + std::to_string(n_handles) + " frames, " + to_string(range.size));
  n_mappings_.fetch_sub(n_handles, std::memory_order_relaxed);
}

}  // namespace kvspan::cuda
