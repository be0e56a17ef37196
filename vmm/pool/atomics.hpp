// The atomics that the pool is written against: std's, or, where KVSPAN_EXPLORED is defined, those
// of the explorer in tests/cpp/explorer, which runs the pool's sources in every order that the C++
// memory model allows.
#pragma once

#ifdef KVSPAN_EXPLORED
#include "explorer/atomics.hpp"
#else
#include <atomic>

#include "pool/atomic_array.hpp"

namespace kvspan {

template <class T>
using Atomic = std::atomic<T>;

}  // namespace kvspan
#endif
