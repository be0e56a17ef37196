// What a child of fork(2) must not inherit: access to the parent's KV memory.
//
// Mappings of a memfd are shared, so a child that still had them would write into its parent's
// caches, and a child that kept the descriptor would keep the memory alive. So a child handler maps
// PROT_NONE over every reservation, closes every memfd and starts a new generation, by which each
// backend sees that it belongs to the parent.
//
// This is the one process-wide thing in kvspan. It has to be: pthread_atfork passes no context to
// its handlers and cannot take them back, so handlers registered per backend would run on backends
// that are long gone. The registry holds addresses and descriptors only, no allocator state.
//
// Threads: all of it is safe. The registry's mutex is held while fork copies the process, so that
// the child finds the registry whole; the child does nothing but system calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvspan::host_fork {

// How often this process's line of ancestors has forked since the first backend was made: the same
// as when a backend was built, unless a fork lies in between.
std::uint64_t generation() noexcept;

// The generation, from now on counted: for backends that have no memory of the host's to guard.
std::uint64_t watch();

// From now until `forget_range`, children find [base, base + size) inaccessible. Call it after the
// range is mapped, and forget it before it is unmapped: a range in the registry is never one that
// another thread may have got from mmap meanwhile.
void guard_range(void* base, std::size_t size);
void forget_range(void* base) noexcept;

// memfd_create of a descriptor that children do not keep, or -1 with errno; and its close. All
// happen under the registry's mutex: a fork sees the descriptor registered or not at all.
int open_memfd(const char* name, unsigned flags);
int duplicate_memfd(int fd);  // of somebody else's
void close_memfd(int fd) noexcept;

}  // namespace kvspan::host_fork
