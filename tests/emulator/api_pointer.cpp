// cuPointerGetAttribute(s) and cuMemGetAddressRange: what an address is.
#include <cstring>

#include "call.h"

using emulator::Address;
using emulator::Call;
using emulator::enter;
using emulator::Mapping;
using emulator::text;
using emulator::ull;

namespace {

struct What {
  const Mapping* mapping = nullptr;  // device memory
  Address base = 0;
  bool reserved = false;  // an address reservation without a mapping here
  const emulator::Pinned* pinned = nullptr;
  Address range_base = 0;  // of the reservation, or of the allocation
  std::size_t range_size = 0;
};

What look_up(Call& call, Address at) {
  What what;
  auto& memory = call.s.memory;
  if (const auto reservation = memory.reservation_of(at);
      reservation != memory.reservations.end()) {
    what.range_base = reservation->first;
    what.range_size = reservation->second.size_bytes;
    if (const auto mapping = memory.mapping_of(at); mapping != memory.mappings.end()) {
      what.mapping = &mapping->second;
      what.base = mapping->first;
    } else {
      what.reserved = true;
    }
  } else if (const auto pinned = memory.pinned_of(at, 1); pinned != memory.pinned.end()) {
    what.pinned = &pinned->second;
    what.base = what.range_base = pinned->first;
    what.range_size = pinned->second.size_bytes;
  } else if (auto next = memory.allocations.upper_bound(at); next != memory.allocations.begin()) {
    --next;
    if (at - next->first < next->second.size_bytes) {
      what.mapping = &next->second;
      what.base = what.range_base = next->first;
      what.range_size = next->second.size_bytes;
    }
  }
  return what;
}

template <typename Value>
void store(void* out, Value value) {
  std::memcpy(out, &value, sizeof value);
}

CUresult attribute(Call& call, const What& what, CUpointer_attribute which, Address at, void* out) {
  const bool device = what.mapping != nullptr && what.mapping->device >= 0;
  const bool known = what.mapping != nullptr || what.pinned != nullptr;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_MAPPED:
      store(out, static_cast<unsigned>(known));
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      if (!known && !what.reserved) return CUDA_ERROR_INVALID_VALUE;
      if (which == CU_POINTER_ATTRIBUTE_RANGE_SIZE) {
        store(out, what.range_size);
      } else {
        store(out, what.range_base);
      }
      return CUDA_SUCCESS;
    default:
      break;
  }
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  const int ordinal = device ? what.mapping->device : what.pinned ? what.pinned->device : -1;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      // Virtual memory belongs to no context.
      store<void*>(out, ordinal >= 0 && !(what.mapping && what.mapping->handle != 0)
                            ? &call.s.contexts[static_cast<std::size_t>(ordinal)]
                            : nullptr);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      store<unsigned>(out, device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      store(out, at);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (device) return CUDA_ERROR_INVALID_VALUE;
      store(out, at);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      store(out, 0U);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      store(out, what.mapping != nullptr && what.mapping->handle != 0 ? what.mapping->handle
                                                                      : what.base);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      store(out, ordinal);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: {
      const auto* handle =
          what.mapping == nullptr ? nullptr : call.s.memory.handle(what.mapping->handle);
      store(out, handle == nullptr
                     ? 0ULL
                     : static_cast<unsigned long long>(handle->properties.requestedHandleTypes));
      return CUDA_SUCCESS;
    }
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS: {
      unsigned flags = 3;
      if (what.mapping != nullptr)
        flags = call.context == nullptr ? 0 : what.mapping->access_of(call.context->device);
      store(out, flags);
      return CUDA_SUCCESS;
    }
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      store<void*>(out, nullptr);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      store(out, what.mapping != nullptr ? what.mapping->size_bytes : what.range_size);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      store(out, what.base);
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

// Bytes of an attribute, for cuPointerGetAttributes' answer about an unknown pointer.
std::size_t width(CUpointer_attribute which) {
  switch (which) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_MAPPED:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return sizeof(unsigned);
    default:
      return sizeof(void*);
  }
}

}  // namespace

CUresult CUDAAPI cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr ptr) {
  return enter("cuPointerGetAttribute", Call::kInit, {static_cast<unsigned>(which), ptr},
               [&](Call& call) -> CUresult {
                 if (data == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
                 return attribute(call, look_up(call, ptr), which, ptr, data);
               });
}

CUresult CUDAAPI cuPointerGetAttributes(unsigned int n, CUpointer_attribute* which, void** data,
                                        CUdeviceptr ptr) {
  return enter("cuPointerGetAttributes", Call::kInit, {n, ptr}, [&](Call& call) -> CUresult {
    if (which == nullptr || data == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    const What what = look_up(call, ptr);
    // cuPointerGetAttributes: an attribute that the pointer does not have is answered with zeros
    // and is no error.
    for (unsigned i = 0; i < n; ++i) {
      if (attribute(call, what, which[i], ptr, data[i]) == CUDA_SUCCESS) continue;
      if (which[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
        store(data[i], -2);
      } else {
        std::memset(data[i], 0, width(which[i]));
      }
    }
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr ptr) {
  return enter("cuMemGetAddressRange", Call::kInit, {ptr}, [&](Call& call) -> CUresult {
    const What what = look_up(call, ptr);
    if (what.mapping == nullptr && what.pinned == nullptr) return CUDA_ERROR_NOT_FOUND;
    if (base != nullptr) *base = what.base;
    if (size != nullptr)
      *size = what.mapping != nullptr ? what.mapping->size_bytes : what.range_size;
    return CUDA_SUCCESS;
  });
}
