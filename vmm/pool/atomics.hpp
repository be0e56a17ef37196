// The atomics that the pool is written against: std's, or those of another header, such as the
// explorer's in tests/cpp/explorer, which runs the pool's sources in every order that the C++
// memory model allows.
#pragma once

#ifdef KVSPAN_ATOMICS_HEADER
#include KVSPAN_ATOMICS_HEADER
#else
#include <atomic>

#include "pool/atomic_array.hpp"

namespace kvspan {

template <class T>
using Atomic = std::atomic<T>;

}  // namespace kvspan
#endif
