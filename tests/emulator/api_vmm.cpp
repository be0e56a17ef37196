// The virtual-memory calls: reserve, create, map, grant access, unmap, release, share. Each check
// cites the call of cuda.h whose text it enforces.
#include <fcntl.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "call.h"

using emulator::Address;
using emulator::Call;
using emulator::enter;
using emulator::Handle;
using emulator::number;
using emulator::text;
using emulator::ull;

namespace {

bool multiple(std::uint64_t value, std::size_t of) { return value % of == 0; }

unsigned vmm_needs() {
  // Not in cuda.h's list of errors; strict until somebody has measured that a driver does without.
  return emulator::state().options.vmm_context ? Call::kContext : Call::kInit;
}

std::string range(Address at, std::size_t n) {
  return text("[0x%llx, 0x%llx)", ull(at), ull(at + n));
}

// The handle, or nullptr and the result of using something else.
Handle* usable(Call& call, std::uint64_t id, CUresult* result) {
  Handle* handle = call.s.memory.handle(id);
  if (handle != nullptr && handle->references > 0) return handle;
  const bool released = handle != nullptr || call.s.memory.existed(id);
  *result = call.violation(CUDA_ERROR_INVALID_VALUE,
                           released ? text("handle 0x%llx was released already", ull(id))
                                    : text("0x%llx is not a handle", ull(id)));
  return nullptr;
}

// cuMemCreate, cuMemGetAllocationGranularity: what `prop` may say. -1 for host memory.
CUresult check_properties(Call& call, const CUmemAllocationProp* prop, int* device) {
  if (prop == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "no properties");
  if (prop->type != CU_MEM_ALLOCATION_TYPE_PINNED)
    return call.misuse(CUDA_ERROR_INVALID_VALUE, "the type is not PINNED");
  const auto types = static_cast<unsigned>(prop->requestedHandleTypes);
  if (types != CU_MEM_HANDLE_TYPE_NONE && types != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
    return call.misuse(CUDA_ERROR_NOT_SUPPORTED, text("handle types 0x%x", types));
  *device = -1;
  switch (prop->location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
      *device = prop->location.id;
      if (*device < 0 || *device >= call.s.options.devices)
        return call.misuse(CUDA_ERROR_INVALID_DEVICE, text("there is no device %d", *device));
      return CUDA_SUCCESS;
    case CU_MEM_LOCATION_TYPE_HOST:
      if (types != 0)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "HOST memory cannot be exported");
      return CUDA_SUCCESS;
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
      if (prop->location.id != 0)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "the only NUMA node is 0");
      return CUDA_SUCCESS;
    default:
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "unknown location type");
  }
}

// "Remap under running work faults": measured, not documented.
void check_unused(Call& call, Address at, std::size_t n) {
  if (!call.s.options.remap_faults) return;
  while (auto* operation = call.s.streams.unfinished_use(at, n, true)) {
    const bool running = operation->progress == emulator::Operation::Progress::kRunning;
    call.violation(CUDA_SUCCESS,
                   text("%s is used by an unfinished %s (operation %llu, %s)", range(at, n).c_str(),
                        operation->name, ull(operation->number), running ? "running" : "queued"));
    if (!operation->faulted) break;
  }
}

}  // namespace

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
                                               CUmemAllocationGranularity_flags option) {
  return enter("cuMemGetAllocationGranularity", Call::kInit, {static_cast<unsigned>(option)},
               [&](Call& call) -> CUresult {
                 if (granularity == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 int device = 0;
                 const CUresult checked = check_properties(call, prop, &device);
                 if (checked != CUDA_SUCCESS) return checked;
                 if (option != CU_MEM_ALLOC_GRANULARITY_MINIMUM &&
                     option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "unknown option");
                 *granularity = option == CU_MEM_ALLOC_GRANULARITY_MINIMUM
                                    ? call.s.options.granularity_bytes
                                    : call.s.options.recommended_bytes;
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* ptr, size_t size, size_t alignment,
                                     CUdeviceptr addr, unsigned long long flags) {
  return enter(
      "cuMemAddressReserve", Call::kInit, {size, alignment, addr, flags},
      [&](Call& call) -> CUresult {
        const std::size_t granularity = call.s.options.granularity_bytes;
        if (ptr == nullptr || flags != 0)
          return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or flags are not 0");
        // cuda.h asks for multiples of the host page only; drivers are known to refuse
        // what is no multiple of the granularity.
        if (size == 0 || !multiple(size, granularity))
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             text("size %llu is no multiple of %zu", ull(size), granularity));
        if ((alignment & (alignment - 1)) != 0)
          return call.misuse(CUDA_ERROR_INVALID_VALUE, "alignment: no power of two");
        if (!multiple(addr, 4096))
          return call.misuse(CUDA_ERROR_INVALID_VALUE, "the hint is no host page");
        const Address at = call.s.memory.take_range(size, std::max(alignment, granularity), addr);
        if (at == 0) return CUDA_ERROR_OUT_OF_MEMORY;
        call.s.memory.reservations[at] = {size, 0};
        *ptr = at;
        return CUDA_SUCCESS;
      });
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  return enter("cuMemAddressFree", Call::kInit, {ptr, size}, [&](Call& call) -> CUresult {
    const auto at = call.s.memory.reservations.find(ptr);
    if (at == call.s.memory.reservations.end() || at->second.size_bytes != size)
      return call.misuse(CUDA_ERROR_INVALID_VALUE,
                         range(ptr, size) + " is not what cuMemAddressReserve returned");
    if (at->second.mappings != 0)
      return call.violation(CUDA_ERROR_INVALID_VALUE,
                            range(ptr, size) + text(" has %zu live mappings", at->second.mappings));
    check_unused(call, ptr, size);
    call.s.memory.give_range(ptr, size);
    call.s.memory.reservations.erase(at);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                             const CUmemAllocationProp* prop, unsigned long long flags) {
  return enter("cuMemCreate", vmm_needs(), {size, flags}, [&](Call& call) -> CUresult {
    if (handle == nullptr || flags != 0)
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or flags are not 0");
    int device = -1;
    const CUresult checked = check_properties(call, prop, &device);
    if (checked != CUDA_SUCCESS) return checked;
    if (size == 0 || !multiple(size, call.s.options.granularity_bytes))
      return call.misuse(CUDA_ERROR_INVALID_VALUE,
                         text("size %zu is no multiple of the minimum granularity", size));
    const std::uint64_t id = call.s.memory.create(size, *prop, device);
    if (id == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = id;
    call.charge(1);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  return enter("cuMemRelease", Call::kInit, {handle}, [&](Call& call) -> CUresult {
    CUresult result = CUDA_SUCCESS;
    Handle* entry = usable(call, handle, &result);
    if (entry == nullptr) return result;
    call.charge(1);
    --entry->references;
    call.s.memory.drop_if_unused(handle);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemMap(CUdeviceptr ptr, size_t size, size_t offset,
                          CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return enter(
      "cuMemMap", vmm_needs(), {ptr, size, offset, handle, flags}, [&](Call& call) -> CUresult {
        auto& memory = call.s.memory;
        const std::size_t granularity = call.s.options.granularity_bytes;
        if (flags != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0");
        if (offset != 0)
          return call.misuse(CUDA_ERROR_INVALID_VALUE, "the offset must be 0 for now");
        if (size == 0 || !multiple(ptr, granularity) || !multiple(size, granularity))
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             range(ptr, size) + " is not aligned to the minimum granularity");
        CUresult result = CUDA_SUCCESS;
        Handle* entry = usable(call, handle, &result);
        if (entry == nullptr) return result;
        if (size > entry->size_bytes)
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             text("%zu bytes of a handle of %zu", size, entry->size_bytes));
        const auto reservation = memory.reservation_of(ptr);
        if (reservation == memory.reservations.end() ||
            size > reservation->second.size_bytes - (ptr - reservation->first))
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             range(ptr, size) + " is not inside one reservation");
        if (memory.overlaps_mapping(ptr, size))
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             range(ptr, size) + " is mapped already, at least in part");
        if (const std::size_t most = call.s.options.max_aliases; most != 0) {
          for (const auto& [base, n] : entry->aliases) {
            if (base == reservation->first && n >= most) return CUDA_ERROR_OUT_OF_MEMORY;
          }
        }
        check_unused(call, ptr, size);
        call.charge(1);
        memory.map(ptr, size, handle, reservation->first);
        return CUDA_SUCCESS;
      });
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr ptr, size_t size) {
  return enter("cuMemUnmap", vmm_needs(), {ptr, size}, [&](Call& call) -> CUresult {
    auto& memory = call.s.memory;
    if (size == 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "nothing to unmap");
    emulator::Memory::Mappings::iterator first, last;
    std::string why;
    if (!memory.exactly(ptr, size, &first, &last, &why))
      return call.misuse(CUDA_ERROR_INVALID_VALUE, range(ptr, size) + ": " + why);
    check_unused(call, ptr, size);
    call.charge(static_cast<std::size_t>(std::distance(first, last)));
    while (first != last) memory.unmap(first++);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* desc,
                                size_t count) {
  return enter("cuMemSetAccess", vmm_needs(), {ptr, size, count}, [&](Call& call) -> CUresult {
    auto& memory = call.s.memory;
    const auto& options = call.s.options;
    if (desc == nullptr || count == 0 || size == 0)
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "nothing to set");
    emulator::Memory::Mappings::iterator first, last;
    std::string why;
    if (!memory.exactly(ptr, size, &first, &last, &why))
      return call.misuse(CUDA_ERROR_INVALID_VALUE, range(ptr, size) + ": " + why);
    for (std::size_t i = 0; i < count; ++i) {
      const auto flags = static_cast<unsigned>(desc[i].flags);
      const auto& location = desc[i].location;
      if (flags != CU_MEM_ACCESS_FLAGS_PROT_NONE && flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
          flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, text("access flags %u", flags));
      if (location.type == CU_MEM_LOCATION_TYPE_DEVICE) {
        if (location.id < 0 || location.id >= options.devices)
          return call.misuse(CUDA_ERROR_INVALID_DEVICE, text("there is no device %d", location.id));
        for (auto at = first; at != last && !options.peers; ++at) {
          if (at->second.device >= 0 && at->second.device != location.id)
            return call.misuse(CUDA_ERROR_INVALID_DEVICE, "the devices are no peers");
        }
      } else if (location.type == CU_MEM_LOCATION_TYPE_HOST ||
                 location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA) {
        for (auto at = first; at != last; ++at) {
          if (at->second.device >= 0)
            return call.misuse(CUDA_ERROR_INVALID_VALUE, "host access to device memory");
        }
      } else {
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "unknown location type");
      }
    }
    if (options.max_mappings != 0) {
      for (const std::size_t mapped : memory.mapped_handles) {
        if (mapped > options.max_mappings) return CUDA_ERROR_OUT_OF_MEMORY;
      }
    }
    call.charge(static_cast<std::size_t>(std::distance(first, last)));
    for (auto at = first; at != last; ++at) {
      auto& mapping = at->second;
      const auto [access, host_access] = std::pair(mapping.access, mapping.host_access);
      for (std::size_t i = 0; i < count; ++i) {
        const auto flags = static_cast<unsigned>(desc[i].flags);
        if (desc[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE) {
          const int shift = 2 * desc[i].location.id;
          mapping.access = (mapping.access & ~(3U << shift)) | (flags << shift);
        } else {
          mapping.host_access = flags;
        }
      }
      if (access == mapping.access && host_access == mapping.host_access) continue;
      check_unused(call, at->first, mapping.size_bytes);
      if (!memory.apply_access(at->first, mapping)) {
        std::perror("kvspan emulator: mapping device memory for the host");
        mapping.access = access;
        mapping.host_access = host_access;
        return CUDA_ERROR_OUT_OF_MEMORY;
      }
    }
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                                CUdeviceptr ptr) {
  return enter("cuMemGetAccess", Call::kInit, {ptr}, [&](Call& call) -> CUresult {
    if (flags == nullptr || location == nullptr)
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    const auto at = call.s.memory.mapping_of(ptr);
    if (at == call.s.memory.mappings.end()) return CUDA_ERROR_INVALID_VALUE;
    if (location->type == CU_MEM_LOCATION_TYPE_DEVICE) {
      if (location->id < 0 || location->id >= call.s.options.devices)
        return call.misuse(CUDA_ERROR_INVALID_DEVICE, text("no device %d", location->id));
      *flags = at->second.access_of(location->id);
    } else {
      *flags = at->second.host_access;
    }
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* addr) {
  return enter("cuMemRetainAllocationHandle", Call::kInit, {number(addr)},
               [&](Call& call) -> CUresult {
                 if (handle == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 const auto at = call.s.memory.mapping_of(number(addr));
                 if (at == call.s.memory.mappings.end()) return CUDA_ERROR_INVALID_VALUE;
                 ++call.s.memory.handle(at->second.handle)->references;
                 *handle = at->second.handle;
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                        CUmemGenericAllocationHandle handle) {
  return enter("cuMemGetAllocationPropertiesFromHandle", Call::kInit, {handle},
               [&](Call& call) -> CUresult {
                 if (prop == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 CUresult result = CUDA_SUCCESS;
                 Handle* entry = usable(call, handle, &result);
                 if (entry == nullptr) return result;
                 *prop = entry->properties;
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType type,
                                              unsigned long long flags) {
  return enter("cuMemExportToShareableHandle", Call::kInit, {handle, static_cast<unsigned>(type)},
               [&](Call& call) -> CUresult {
                 if (shareable == nullptr || flags != 0)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or flags are not 0");
                 CUresult result = CUDA_SUCCESS;
                 Handle* entry = usable(call, handle, &result);
                 if (entry == nullptr) return result;
                 if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
                   return call.misuse(CUDA_ERROR_NOT_SUPPORTED, "only POSIX descriptors");
                 if ((static_cast<unsigned>(entry->properties.requestedHandleTypes) & type) == 0)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE,
                                      "the handle was not created to be exported");
                 if (entry->physical == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
                 const int fd = ::fcntl(entry->physical->fd, F_DUPFD_CLOEXEC, 3);
                 if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
                 *static_cast<int*>(shareable) = fd;
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
                                                void* os_handle, CUmemAllocationHandleType type) {
  return enter("cuMemImportFromShareableHandle", Call::kInit,
               {number(os_handle), static_cast<unsigned>(type)}, [&](Call& call) -> CUresult {
                 if (handle == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
                   return call.misuse(CUDA_ERROR_NOT_SUPPORTED, "only POSIX descriptors");
                 if (call.s.options.memory_free) return CUDA_ERROR_NOT_SUPPORTED;
                 const std::uint64_t id = call.s.memory.import(static_cast<int>(number(os_handle)));
                 if (id == 0)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "not an exported allocation");
                 *handle = id;
                 call.charge(1);
                 return CUDA_SUCCESS;
               });
}
