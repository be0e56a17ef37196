// A fixed array of atomic integers that starts as zeros and takes physical memory only where it is
// touched: a pool is sized for its whole capacity (up to 2^28 frames a class) on the day it is
// made, and most of that is never reached. calloc gives that for free, large blocks being fresh
// pages of the kernel's; plain integers seen through atomic_ref need no constructor that would
// touch them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace kvspan {

template <class T>
class AtomicArray {
 public:
  explicit AtomicArray(std::size_t n)
      : values_(static_cast<T*>(std::calloc(n == 0 ? 1 : n, sizeof(T)))) {
    if (values_ == nullptr) throw std::bad_alloc{};
  }

  std::atomic_ref<T> operator[](std::size_t i) const noexcept {
    return std::atomic_ref<T>(values_.get()[i]);
  }

 private:
  static_assert(std::atomic_ref<T>::is_always_lock_free);
  static_assert(std::atomic_ref<T>::required_alignment <= alignof(std::max_align_t));

  struct Free {
    void operator()(T* p) const noexcept { std::free(p); }
  };
  std::unique_ptr<T, Free> values_;
};

}  // namespace kvspan
