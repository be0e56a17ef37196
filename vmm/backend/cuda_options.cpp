#include "backend/cuda_options.hpp"

#include <algorithm>

#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::cuda {

namespace {

constexpr Bytes kLargestPage = kMiB * 64;

Bytes granularity_of(const Context& context, int ordinal, CUmemAllocationGranularity_flags which) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = ordinal;
  std::size_t granularity = 0;
  check(context.api(),
        context.api().cuMemGetAllocationGranularity(&granularity, &properties, which),
        "cuMemGetAllocationGranularity", "cannot ask which sizes memory has");
  return Bytes(granularity);
}

bool can(const Context& context, CUdevice_attribute attribute) {
  int value = 0;
  check(context.api(), context.api().cuDeviceGetAttribute(&value, attribute, context.device()),
        "cuDeviceGetAttribute", "cannot ask what the device can do");
  return value != 0;
}

void check_peer(const Context& context, const CudaOptions& o, int peer) {
  const Driver& api = context.api();
  int count = 0, can_access = 0;
  check(api, api.cuDeviceGetCount(&count), "cuDeviceGetCount", "cannot count the devices");
  const bool is_another = peer >= 0 && peer < count && peer != o.ordinal;
  if (is_another) {
    CUdevice device = 0;
    check(api, api.cuDeviceGet(&device, peer), "cuDeviceGet",
          "cannot get the peer cuda:" + std::to_string(peer));
    check(api, api.cuDeviceCanAccessPeer(&can_access, device, context.device()),
          "cuDeviceCanAccessPeer", "cannot ask the peer cuda:" + std::to_string(peer));
  }
  if (can_access == 0 || std::ranges::count(o.peers, peer) != 1) {
    throw InvalidArgument("cuda:" + std::to_string(peer) +
                          " cannot be a peer of cuda:" + std::to_string(o.ordinal) +
                          ": peers are other devices, named once, that can access its memory");
  }
}

}  // namespace

CudaOptions checked(const Context& context, CudaOptions o) {
  if (o.page_size == Bytes(0)) {
    o.page_size = granularity_of(context, o.ordinal, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  }
  const Bytes least = granularity_of(context, o.ordinal, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (!is_power_of_two(o.page_size) || o.page_size.value % least.value != 0 ||
      o.page_size > kLargestPage) {
    throw InvalidArgument("page_size on cuda:" + std::to_string(o.ordinal) +
                          " is a power of two from " + to_string(least) + " to " +
                          to_string(kLargestPage) + ", not " + to_string(o.page_size));
  }
  if (o.capacity == Bytes(0) || o.capacity.value % o.page_size.value != 0) {
    throw InvalidArgument("capacity is a positive multiple of the page size (" +
                          to_string(o.page_size) + "), not " + to_string(o.capacity));
  }
  std::size_t free = 0, total = 0;
  check(context.api(), context.api().cuMemGetInfo(&free, &total), "cuMemGetInfo",
        "cannot ask how much memory there is");
  if (o.capacity.value > total) {
    throw InvalidArgument("capacity is " + to_string(o.capacity) + ", more than the " +
                          to_string(Bytes(total)) +
                          " of memory that cuda:" + std::to_string(o.ordinal) + " has");
  }
  if (o.largest_class.value > FrameId::kMaxClass) {
    throw InvalidArgument("largest_class is at most " + std::to_string(FrameId::kMaxClass) +
                          ", not " + std::to_string(o.largest_class.value));
  }
  for (const int peer : o.peers) check_peer(context, o, peer);
  if (o.is_shareable &&
      !can(context, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)) {
    throw InvalidArgument("cuda:" + std::to_string(o.ordinal) +
                          " cannot export memory as file descriptors: use shareable=False");
  }
  return o;
}

}  // namespace kvspan::cuda
