// The CUDA driver emulator (tests/emulator), for programs that count and model. Its times are
// virtual, made up of published latencies: nothing that comes of it is a GPU result.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator/emulator.h"

namespace kvspan::bench {

// Loaded before the CUDA backend looks for a driver, which finds it then by its name.
class Emulator {
 public:
  explicit Emulator(const std::string& options)
      : library_(dlopen(KVSPAN_EMULATOR_FILE, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(1);
    }
    restart(options);
    ok(get<int(unsigned)>("cuInit")(0));
    ok(get<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context_, 0));
    ok(get<int(void*)>("cuCtxSetCurrent")(context_));
    constexpr unsigned kNonBlocking = 1;
    ok(get<int(void**, unsigned)>("cuStreamCreate")(&stream_, kNonBlocking));
  }
  Emulator(const Emulator&) = delete;
  Emulator& operator=(const Emulator&) = delete;
  ~Emulator() {
    ok(get<int(void*)>("cuStreamDestroy_v2")(stream_));
    ok(get<int(void*)>("cuCtxSetCurrent")(nullptr));
    ok(get<int(int)>("cuDevicePrimaryCtxRelease_v2")(0));
  }

  void* stream() const { return stream_; }
  double clock() const { return clock_(); }
  void advance(double us) const { advance_(us); }
  void set_lane(int lane) const { set_lane_(lane); }
  double lock_wait() const { return lock_wait_(); }
  unsigned long long handles(const char* name) const { return handles_(name); }

  // A kernel on the stream that reads [at, at + size).
  void launch(unsigned long long at, std::size_t size, double us) const {
    ok(kernel_(stream_, at, size, 0, us, nullptr));
  }
  void synchronize() const { ok(synchronize_(stream_)); }

 private:
  template <class F>
  F* get(const char* name) const {
    void* const found = dlsym(library_, name);
    if (found == nullptr) {
      std::fprintf(stderr, "the emulator has no %s\n", name);
      std::exit(1);
    }
    return reinterpret_cast<F*>(found);
  }
#define KVSPAN_CONTROL(name) get<decltype(kvspan_emulator_##name)>("kvspan_emulator_" #name)

  void restart(const std::string& options) const { ok(KVSPAN_CONTROL(reset)(options.c_str())); }
  static void ok(int result) {
    if (result == 0) return;
    std::fprintf(stderr, "the emulator answered %d\n", result);
    std::exit(1);
  }

  void* const library_;
  decltype(kvspan_emulator_clock)* const clock_ = KVSPAN_CONTROL(clock);
  decltype(kvspan_emulator_advance)* const advance_ = KVSPAN_CONTROL(advance);
  decltype(kvspan_emulator_set_lane)* const set_lane_ = KVSPAN_CONTROL(set_lane);
  decltype(kvspan_emulator_lock_wait)* const lock_wait_ = KVSPAN_CONTROL(lock_wait);
  decltype(kvspan_emulator_handles)* const handles_ = KVSPAN_CONTROL(handles);
  decltype(kvspan_emulator_read_kernel)* const kernel_ = KVSPAN_CONTROL(read_kernel);
  int (*const synchronize_)(void*) = get<int(void*)>("cuStreamSynchronize");
#undef KVSPAN_CONTROL
  void* context_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace kvspan::bench
