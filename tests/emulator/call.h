// The entry of every driver call: lock, fork and initialisation checks, injected faults, counts,
// virtual time, log. An entry point is enter("cuMemMap", {arguments}, body); the body says what the
// call does and returns its result, through misuse() or violation() where the client is wrong.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>

#include "state.h"

namespace emulator {

class Call {
 public:
  enum Needs : unsigned { kNothing = 0, kInit = 1, kContext = 3 };

  Call(const char* call, unsigned needs) : name(call), lock(state().mutex), needs_(needs) {}

  // CUDA_SUCCESS, or the result that makes the body superfluous.
  CUresult begin();
  CUresult end(CUresult result, std::initializer_list<std::uint64_t> arguments);

  // Costs the call's latency `handles` times (at least once) and counts them. A body that submits
  // work calls this first; otherwise it happens at the end.
  void charge(std::size_t handles);
  // The client asked for something that the documentation answers with this error.
  CUresult misuse(CUresult result, const std::string& what);
  // The client did something that the documentation leaves undefined.
  CUresult violation(CUresult result, const std::string& what);
  bool no_device(CUdevice device) const { return device < 0 || device >= s.options.devices; }
  CUresult bad_device(CUdevice device);

  const char* const name;
  State& s = state();
  Lock lock;
  Context* context = nullptr;  // the current one

 private:
  const unsigned needs_;
  bool charged_ = false;
  std::size_t handles_ = 0;
};

template <typename Body>
CUresult enter(const char* name, unsigned needs, std::initializer_list<std::uint64_t> arguments,
               Body&& body) noexcept {
  if (state().forked) return CUDA_ERROR_NOT_INITIALIZED;
  Call call(name, needs);
  CUresult result = call.begin();
  if (result == CUDA_SUCCESS) {
    try {
      result = body(call);
    } catch (const std::bad_alloc&) {
      if (!call.lock.owns_lock()) call.lock.lock();
      result = CUDA_ERROR_OUT_OF_MEMORY;
    }
  }
  return call.end(result, arguments);
}

template <typename Pointer>
std::uint64_t number(Pointer* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

inline unsigned long long ull(std::uint64_t value) { return value; }

}  // namespace emulator
