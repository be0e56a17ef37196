// The CUDA driver as the tests reach it besides the backend, by dlsym: the same on a GPU and on the
// emulator. Also the backend that they run, and how they read its memory.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "backend/cuda_backend.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

inline void* library() {
  static void* const found = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return found;
}

template <class F>
F* function(const char* name) {
  void* const found = library() == nullptr ? nullptr : dlsym(library(), name);
  // Thrown and not BOOST_REQUIREd here and below: Boost.Test's log is one thread's.
  if (found == nullptr) {
    throw std::runtime_error(std::string(name) + ": the driver found has no such function");
  }
  return reinterpret_cast<F*>(found);
}

inline bool is_emulated() {
  return library() != nullptr && dlsym(library(), "kvspan_emulator_reset") != nullptr;
}

inline CudaOptions options(Bytes page_size, Bytes capacity) {
  return {.page_size = page_size,
          .capacity = capacity,
          .largest_class = SizeClass(2),
          .is_shareable = true};
}

inline std::unique_ptr<Backend> cuda(Bytes page_size, Bytes capacity) {
  return make_cuda_backend(options(page_size, capacity));
}

inline std::unique_ptr<Backend> cuda() { return cuda(kMiB * 2, kMiB * 32); }

inline FrameRun frames(std::uint32_t first, std::uint32_t count) {
  return {FrameId(SizeClass(0), first), count};
}

// The context of another user of the device in this process, such as torch.
class UserContext {
 public:
  UserContext() {
    void* context = nullptr;
    if (function<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, 0) != 0) {
      throw std::runtime_error("no context");
    }
    if (function<int(void*)>("cuCtxPushCurrent_v2")(context) != 0) {
      throw std::runtime_error("no context");
    }
  }
  UserContext(const UserContext&) = delete;
  UserContext& operator=(const UserContext&) = delete;
  ~UserContext() {
    void* popped = nullptr;
    function<int(void**)>("cuCtxPopCurrent_v2")(&popped);
    function<int(int)>("cuDevicePrimaryCtxRelease_v2")(0);
  }
};

// Device memory is not the host's to read: the driver copies it.
inline std::uint8_t peek(Backend&, Address at) {
  const UserContext context;
  std::uint8_t value = 0;
  const int result =
      function<int(void*, unsigned long long, std::size_t)>("cuMemcpyDtoH_v2")(&value, at.value, 1);
  if (result != 0) throw std::runtime_error("cuMemcpyDtoH: " + std::to_string(result));
  return value;
}

}  // namespace kvspan::test
