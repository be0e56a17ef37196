// What the pool knows of threads: the atomics that it is written against, a number for each thread,
// and how to wait for another one. They are std's, or those of another header, such as the
// explorer's in tests/cpp/explorer, which runs the pool's sources in every order that the C++
// memory model allows.
#pragma once

#ifdef KVSPAN_ATOMICS_HEADER
#include KVSPAN_ATOMICS_HEADER
#else
#include <atomic>
#include <cstdint>
#include <thread>

#include "pool/atomic_array.hpp"

namespace kvspan {

template <class T>
using Atomic = std::atomic<T>;

// 0 to kThreadNumbers - 1, dealt out in turn: few threads at a time have the same one.
inline constexpr std::uint32_t kThreadNumbers = 32;

inline std::uint32_t thread_number() noexcept {
  static std::atomic<std::uint32_t> n_threads{0};
  thread_local std::uint32_t number = kThreadNumbers;  // a constant, so access needs no guard
  // relaxed: it spreads threads and means nothing else.
  if (number == kThreadNumbers) {
    number = n_threads.fetch_add(1, std::memory_order_relaxed) % kThreadNumbers;
  }
  return number;
}

inline void let_others_run() noexcept { std::this_thread::yield(); }

}  // namespace kvspan
#endif
