// The exception tree. Every failure that a caller can act on has a type of its own, and every
// message says three things: what was wrong, what is allowed, and what to do. Whoever throws one of
// these has left all state as it was before the call, but for RefusedError, which says more.
#pragma once

#include <stdexcept>
#include <string>

#include "core/ids.hpp"

namespace kvspan {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Physical memory is short: an answer, not a crash. What was there before stays valid.
class OutOfMemory : public Error {
 public:
  // `hint` ends the message: what the caller can do.
  OutOfMemory(Bytes requested, Bytes free, Bytes reclaimable, const std::string& hint);

  Bytes requested() const noexcept { return requested_; }
  Bytes free() const noexcept { return free_; }
  Bytes reclaimable() const noexcept { return reclaimable_; }

 private:
  Bytes requested_, free_, reclaimable_;
};

// A frame pool has too few frames free: the same answer, in frames, where there is no memory yet.
class OutOfFrames : public Error {
 public:
  OutOfFrames(std::uint64_t requested, std::uint64_t free, const std::string& hint);

  std::uint64_t requested() const noexcept { return requested_; }
  std::uint64_t free() const noexcept { return free_; }

 private:
  std::uint64_t requested_, free_;
};

// Some of the frames that a call named are not in use. The one error after which the state may be
// another: the call has dealt with the other frames.
class RefusedError : public Error {
 public:
  RefusedError(std::uint32_t n_refused, const std::string& message);

  std::uint32_t n_refused() const noexcept { return n_refused_; }

 private:
  std::uint32_t n_refused_;
};

// An argument that can never work, whatever the state.
class InvalidArgument : public Error {
  using Error::Error;
};

// A limit other than memory is reached: slots, positions, mappings (vm.max_map_count), address
// space.
class CapacityError : public Error {
  using Error::Error;
};

// The object was released or closed, or belongs to the parent of a fork(2).
class ReleasedError : public Error {
  using Error::Error;
};

// Another thread is inside a call on the same sequence.
class BusyError : public Error {
  using Error::Error;
};

// The operating system or the driver refused a call that should have worked.
class DriverError : public Error {
 public:
  // `call` is the driver's name for it ("mmap", "cuMemMap"), `code` the driver's name of the error.
  DriverError(const std::string& call, const std::string& code, const std::string& detail);

  const std::string& call() const noexcept { return call_; }
  const std::string& code() const noexcept { return code_; }

 private:
  std::string call_, code_;
};

// The DriverError of a system call that failed with `error_number`.
DriverError system_error(const std::string& call, int error_number, const std::string& detail);

}  // namespace kvspan
