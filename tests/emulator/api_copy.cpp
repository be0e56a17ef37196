// Copies, fills and the memory that is not virtual memory: cuMemAlloc, pinned host memory.
//
// Host memory: an asynchronous copy reads pinned memory when it runs, so that a client that
// overwrites a pinned buffer too early sees it; from pageable memory it takes the bytes at the
// call, and a copy to pageable memory returns when it is done (cuda.h, "API synchronization
// behavior").
#include <algorithm>
#include <cstring>

#include "call.h"

using emulator::Access;
using emulator::Address;
using emulator::Call;
using emulator::enter;
using emulator::number;
using emulator::Operation;
using emulator::Stream;
using emulator::text;
using emulator::ull;

namespace {

enum class Place { kHost, kDevice, kEither };

CUresult bad_stream(Call& call, CUstream handle) {
  return call.violation(CUDA_ERROR_INVALID_HANDLE,
                        call.s.streams.was_destroyed(handle)
                            ? text("stream 0x%llx was destroyed already", ull(number(handle)))
                            : text("0x%llx is not a stream", ull(number(handle))));
}

// Which memory it is, when the call says which it should be. False: it is the other kind.
bool settle(Call& call, Address at, Place* place) {
  const bool device = call.s.memory.is_device(at);
  if (*place == Place::kEither) *place = device ? Place::kDevice : Place::kHost;
  return device == (*place == Place::kDevice);
}

// The driver inspects the pointers of a copy at the call, before anything runs.
bool accessible(Call& call, Stream* stream, const Access& access, bool copies) {
  std::string why;
  if (!access.device) return true;
  if (call.s.memory.resolve(access.at, access.n, {stream->context->device, copies}, access.write,
                            nullptr, &why))
    return true;
  call.violation(
      CUDA_SUCCESS,
      text("%s [0x%llx, 0x%llx) on device %d: %s", access.write ? "writes" : "reads",
           ull(access.at), ull(access.at + access.n), stream->context->device, why.c_str()));
  return false;
}

CUresult copy(const char* name, Address to, Place to_place, Address from, Place from_place,
              std::size_t n, CUstream handle, bool wait) {
  return enter(name, Call::kContext, {to, from, n, number(handle)}, [&](Call& call) -> CUresult {
    Stream* stream = call.s.streams.find(handle, call.context);
    if (stream == nullptr) return bad_stream(call, handle);
    call.charge(0);
    if (n == 0) return CUDA_SUCCESS;
    if (!settle(call, to, &to_place) || !settle(call, from, &from_place))
      return call.violation(CUDA_ERROR_INVALID_VALUE,
                            text("0x%llx or 0x%llx is not the kind of memory that the call names",
                                 ull(to), ull(from)));
    const bool to_device = to_place == Place::kDevice;
    const bool from_device = from_place == Place::kDevice;
    const auto none = call.s.memory.pinned.end();
    const bool pinned_from = !from_device && call.s.memory.pinned_of(from, n) != none;
    const bool pinned_to = !to_device && call.s.memory.pinned_of(to, n) != none;
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::Kind::kCopy;
    operation->name = name;
    operation->accesses = {{to, n, true, to_device}};
    const Access source{from, n, false, from_device};
    if (!accessible(call, stream, operation->accesses[0], true) ||
        !accessible(call, stream, source, true))
      return CUDA_ERROR_INVALID_VALUE;
    if (!from_device && !pinned_from && !wait && !call.s.options.memory_free) {
      const auto* bytes = reinterpret_cast<const std::byte*>(from);
      operation->staged = std::make_shared<std::vector<std::byte>>(bytes, bytes + n);
    } else {
      operation->accesses.push_back(source);
    }
    const bool inside = to_device && from_device;
    operation->duration_us = static_cast<double>(n) / (inside ? call.s.options.device_bytes_per_us
                                                              : call.s.options.host_bytes_per_us);
    if (call.s.options.memory_free && !(to_device && from_device)) {
      // Nothing moves, and the host's side is not looked at either.
      std::erase_if(operation->accesses, [](const Access& access) { return !access.device; });
      operation->kind = Operation::Kind::kMark;
    }
    call.s.streams.submit(stream, operation);
    const bool returns_early = to_device || pinned_to || from_place == Place::kHost;
    if (!wait && !call.s.options.eager && returns_early) return CUDA_SUCCESS;
    call.s.streams.wait(call.lock, operation);
    return operation->faulted ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
  });
}

CUresult fill(const char* name, Address to, std::uint32_t value, std::size_t width, std::size_t n,
              CUstream handle, bool wait) {
  return enter(name, Call::kContext, {to, value, n, number(handle)}, [&](Call& call) -> CUresult {
    Stream* stream = call.s.streams.find(handle, call.context);
    if (stream == nullptr) return bad_stream(call, handle);
    call.charge(0);
    if (stream->context != call.context)
      return call.violation(CUDA_ERROR_INVALID_HANDLE, "the stream is of another context");
    if (to % width != 0)
      return call.misuse(CUDA_ERROR_INVALID_VALUE,
                         text("0x%llx is not aligned to %zu bytes", ull(to), width));
    if (n == 0) return CUDA_SUCCESS;
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::Kind::kFill;
    operation->name = name;
    operation->accesses = {{to, n * width, true, call.s.memory.is_device(to)}};
    if (!operation->accesses[0].device &&
        call.s.memory.pinned_of(to, n * width) == call.s.memory.pinned.end())
      return call.violation(CUDA_ERROR_INVALID_VALUE,
                            text("0x%llx is neither device nor pinned memory", ull(to)));
    if (!accessible(call, stream, operation->accesses[0], false)) return CUDA_ERROR_INVALID_VALUE;
    operation->value = value;
    operation->width = width;
    operation->duration_us = static_cast<double>(n * width) / call.s.options.device_bytes_per_us;
    call.s.streams.submit(stream, operation);
    if (wait || call.s.options.eager) call.s.streams.wait(call.lock, operation);
    return operation->faulted ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
  });
}

CUresult host_alloc(const char* name, void** out, std::size_t n, unsigned flags) {
  return enter(name, Call::kContext, {n, flags}, [&](Call& call) -> CUresult {
    if (out == nullptr || n == 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null or 0 bytes");
    if ((flags & ~7U) != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags");
    *out = call.s.memory.allocate_pinned(n, flags, call.context->device);
    return *out == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
  });
}

CUresult host_free(const char* name, void* at, bool registered) {
  return enter(name, Call::kInit, {number(at)}, [&](Call& call) -> CUresult {
    const auto entry = call.s.memory.pinned.find(number(at));
    if (entry == call.s.memory.pinned.end() || entry->second.registered != registered)
      return call.violation(
          registered ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : CUDA_ERROR_INVALID_VALUE,
          text("0x%llx is not such a host allocation, or not any more", ull(number(at))));
    if (auto* use = call.s.streams.unfinished_use(entry->first, entry->second.size_bytes, false)) {
      call.violation(CUDA_SUCCESS,
                     text("0x%llx is used by an unfinished %s", ull(number(at)), use->name));
      call.s.streams.wait(call.lock,
                          &call.s.contexts[static_cast<std::size_t>(entry->second.device)]);
    }
    call.s.memory.free_pinned(entry);
    return CUDA_SUCCESS;
  });
}

Address address(CUdeviceptr at) { return at; }
Address address(const void* at) { return number(at); }

CUstream per_thread(CUstream stream) { return stream == nullptr ? CU_STREAM_PER_THREAD : stream; }

}  // namespace

// Each call in three forms: as declared, and for clients that were compiled for per-thread default
// streams (_ptsz, _ptds: the null stream is the calling thread's).
#define COPY(plain, symbol, symbol_ptds, T, F, to_place, from_place)                              \
  CUresult CUDAAPI symbol(T to, F from, size_t n) {                                               \
    return copy(plain, address(to), to_place, address(from), from_place, n, nullptr, true);       \
  }                                                                                               \
  EMULATOR_EXPORT CUresult CUDAAPI symbol_ptds(T to, F from, size_t n) {                          \
    return copy(plain, address(to), to_place, address(from), from_place, n, CU_STREAM_PER_THREAD, \
                true);                                                                            \
  }
#define COPY_ASYNC(plain, symbol, symbol_ptsz, T, F, to_place, from_place)                      \
  CUresult CUDAAPI symbol(T to, F from, size_t n, CUstream stream) {                            \
    return copy(plain, address(to), to_place, address(from), from_place, n, stream, false);     \
  }                                                                                             \
  EMULATOR_EXPORT CUresult CUDAAPI symbol_ptsz(T to, F from, size_t n, CUstream stream) {       \
    return copy(plain, address(to), to_place, address(from), from_place, n, per_thread(stream), \
                false);                                                                         \
  }
COPY("cuMemcpy", cuMemcpy, cuMemcpy_ptds, CUdeviceptr, CUdeviceptr, Place::kEither, Place::kEither)
COPY("cuMemcpyHtoD", cuMemcpyHtoD_v2, cuMemcpyHtoD_v2_ptds, CUdeviceptr, const void*,
     Place::kDevice, Place::kHost)
COPY("cuMemcpyDtoH", cuMemcpyDtoH_v2, cuMemcpyDtoH_v2_ptds, void*, CUdeviceptr, Place::kHost,
     Place::kDevice)
COPY("cuMemcpyDtoD", cuMemcpyDtoD_v2, cuMemcpyDtoD_v2_ptds, CUdeviceptr, CUdeviceptr,
     Place::kDevice, Place::kDevice)
COPY_ASYNC("cuMemcpyAsync", cuMemcpyAsync, cuMemcpyAsync_ptsz, CUdeviceptr, CUdeviceptr,
           Place::kEither, Place::kEither)
COPY_ASYNC("cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync_v2_ptsz, CUdeviceptr,
           const void*, Place::kDevice, Place::kHost)
COPY_ASYNC("cuMemcpyDtoHAsync", cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync_v2_ptsz, void*, CUdeviceptr,
           Place::kHost, Place::kDevice)
COPY_ASYNC("cuMemcpyDtoDAsync", cuMemcpyDtoDAsync_v2, cuMemcpyDtoDAsync_v2_ptsz, CUdeviceptr,
           CUdeviceptr, Place::kDevice, Place::kDevice)

#define FILL(plain, symbol, symbol_ptds, T, width)                                  \
  CUresult CUDAAPI symbol(CUdeviceptr to, T value, size_t n) {                      \
    return fill(plain, to, value, width, n, nullptr, true);                         \
  }                                                                                 \
  EMULATOR_EXPORT CUresult CUDAAPI symbol_ptds(CUdeviceptr to, T value, size_t n) { \
    return fill(plain, to, value, width, n, CU_STREAM_PER_THREAD, true);            \
  }
#define FILL_ASYNC(plain, symbol, symbol_ptsz, T, width)                          \
  CUresult CUDAAPI symbol(CUdeviceptr to, T value, size_t n, CUstream stream) {   \
    return fill(plain, to, value, width, n, stream, false);                       \
  }                                                                               \
  EMULATOR_EXPORT CUresult CUDAAPI symbol_ptsz(CUdeviceptr to, T value, size_t n, \
                                               CUstream stream) {                 \
    return fill(plain, to, value, width, n, per_thread(stream), false);           \
  }
FILL("cuMemsetD8", cuMemsetD8_v2, cuMemsetD8_v2_ptds, unsigned char, 1)
FILL("cuMemsetD16", cuMemsetD16_v2, cuMemsetD16_v2_ptds, unsigned short, 2)
FILL("cuMemsetD32", cuMemsetD32_v2, cuMemsetD32_v2_ptds, unsigned int, 4)
FILL_ASYNC("cuMemsetD8Async", cuMemsetD8Async, cuMemsetD8Async_ptsz, unsigned char, 1)
FILL_ASYNC("cuMemsetD16Async", cuMemsetD16Async, cuMemsetD16Async_ptsz, unsigned short, 2)
FILL_ASYNC("cuMemsetD32Async", cuMemsetD32Async, cuMemsetD32Async_ptsz, unsigned int, 4)

CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr* ptr, size_t n) {
  return enter("cuMemAlloc", Call::kContext, {n}, [&](Call& call) -> CUresult {
    if (ptr == nullptr || n == 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null or 0 bytes");
    const Address at = call.s.memory.allocate(n, call.context->device);
    if (at == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *ptr = at;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemFree_v2(CUdeviceptr ptr) {
  return enter("cuMemFree", Call::kInit, {ptr}, [&](Call& call) -> CUresult {
    if (ptr == 0) return CUDA_SUCCESS;
    const auto at = call.s.memory.allocations.find(ptr);
    if (at == call.s.memory.allocations.end())
      return call.violation(
          CUDA_ERROR_INVALID_VALUE,
          text("0x%llx is not a cuMemAlloc allocation, or not any more", ull(ptr)));
    // cuMemFree waits for the work that may use the memory.
    call.s.streams.wait(call.lock, &call.s.contexts[static_cast<std::size_t>(at->second.device)]);
    call.s.memory.deallocate(at);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemGetInfo_v2(size_t* free, size_t* total) {
  return enter("cuMemGetInfo", Call::kContext, {}, [&](Call& call) -> CUresult {
    const auto device = static_cast<std::size_t>(call.context->device);
    if (free != nullptr) *free = call.s.options.memory_bytes - call.s.memory.used_bytes[device];
    if (total != nullptr) *total = call.s.options.memory_bytes;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemHostAlloc(void** out, size_t n, unsigned int flags) {
  return host_alloc("cuMemHostAlloc", out, n, flags);
}

CUresult CUDAAPI cuMemAllocHost_v2(void** out, size_t n) {
  return host_alloc("cuMemAllocHost", out, n, 0);
}

CUresult CUDAAPI cuMemFreeHost(void* at) { return host_free("cuMemFreeHost", at, false); }

CUresult CUDAAPI cuMemHostRegister_v2(void* at, size_t n, unsigned int flags) {
  return enter("cuMemHostRegister", Call::kContext, {number(at), n, flags},
               [&](Call& call) -> CUresult {
                 if (at == nullptr || n == 0)
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "null or 0 bytes");
                 auto& pinned = call.s.memory.pinned;
                 const Address first = number(at);
                 const auto next = pinned.lower_bound(first);
                 if (call.s.memory.pinned_of(first, 1) != pinned.end() ||
                     (next != pinned.end() && next->first < first + n))
                   return call.misuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "registered");
                 pinned[first] = {n, flags, true, call.context->device};
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemHostUnregister(void* at) {
  return host_free("cuMemHostUnregister", at, true);
}

CUresult CUDAAPI cuMemHostGetDevicePointer_v2(CUdeviceptr* ptr, void* at, unsigned int flags) {
  return enter("cuMemHostGetDevicePointer", Call::kContext, {number(at), flags},
               [&](Call& call) -> CUresult {
                 if (ptr == nullptr || flags != 0 ||
                     call.s.memory.pinned_of(number(at), 1) == call.s.memory.pinned.end())
                   return call.misuse(CUDA_ERROR_INVALID_VALUE, "not pinned memory");
                 *ptr = number(at);
                 return CUDA_SUCCESS;
               });
}

CUresult CUDAAPI cuMemHostGetFlags(unsigned int* flags, void* at) {
  return enter("cuMemHostGetFlags", Call::kContext, {number(at)}, [&](Call& call) -> CUresult {
    const auto entry = call.s.memory.pinned_of(number(at), 1);
    if (flags == nullptr || entry == call.s.memory.pinned.end())
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "not pinned memory");
    *flags = entry->second.flags;
    return CUDA_SUCCESS;
  });
}
