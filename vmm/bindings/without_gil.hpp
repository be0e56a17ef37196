// Drops the GIL for the length of a call. pybind11's own guard ends the process when a daemon
// thread comes back after the interpreter is gone: Python then ends the thread by unwinding its
// stack (pthread_exit), which a destructor that may not throw turns into std::terminate.
#pragma once

#include <pybind11/pybind11.h>

namespace kvspan {

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* const state_;
};

}  // namespace kvspan
