// What the pool knows of threads when it is explored; pool/atomics.hpp includes it then.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <source_location>
#include <vector>

#include "explorer/explorer.hpp"

namespace kvspan {

template <class T>
class AtomicRef {
  using Where = std::source_location;

 public:
  explicit AtomicRef(kvspan_test::explorer::Location location) : location_(location) {}

  T load(std::memory_order order, Where where = Where::current()) const {
    return static_cast<T>(kvspan_test::explorer::load(location_, order, where));
  }
  void store(T value, std::memory_order order, Where where = Where::current()) const {
    kvspan_test::explorer::store(location_, static_cast<kvspan_test::explorer::Word>(value), order,
                                 where);
  }
  T fetch_or(T bits, std::memory_order order, Where where = Where::current()) const {
    return change([=](T old) { return static_cast<T>(old | bits); }, order, where);
  }
  T fetch_and(T bits, std::memory_order order, Where where = Where::current()) const {
    return change([=](T old) { return static_cast<T>(old & bits); }, order, where);
  }
  T fetch_add(T n, std::memory_order order, Where where = Where::current()) const {
    return change([=](T old) { return static_cast<T>(old + n); }, order, where);
  }
  T exchange(T value, std::memory_order order, Where where = Where::current()) const {
    return change([=](T) { return value; }, order, where);
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order success,
                               std::memory_order failure, Where where = Where::current()) const {
    return compare_exchange_weak(expected, desired, success, failure, where);
  }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order success,
                             std::memory_order failure, Where where = Where::current()) const {
    using kvspan_test::explorer::Word;
    const T wanted = expected;
    const auto replaced = [=](Word old) {
      return static_cast<T>(old) == wanted ? std::optional<Word>(static_cast<Word>(desired))
                                           : std::nullopt;
    };
    expected = static_cast<T>(
        kvspan_test::explorer::exchange(location_, replaced, success, failure, where));
    return expected == wanted;
  }

 private:
  template <class Change>
  T change(const Change& change, std::memory_order order, Where where) const {
    using kvspan_test::explorer::Word;
    const auto changed = [&](Word old) {
      return std::optional<Word>(static_cast<Word>(change(static_cast<T>(old))));
    };
    return static_cast<T>(kvspan_test::explorer::exchange(location_, changed, order, order, where));
  }

  kvspan_test::explorer::Location location_;
};

template <class T>
class Atomic : public AtomicRef<T> {
 public:
  Atomic(T value)
      : AtomicRef<T>(
            kvspan_test::explorer::new_location(static_cast<kvspan_test::explorer::Word>(value))) {}
};

template <class T>
class AtomicArray {
 public:
  explicit AtomicArray(std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      values_.push_back(AtomicRef<T>(kvspan_test::explorer::new_location(0)));
    }
  }
  const AtomicRef<T>& operator[](std::size_t i) const noexcept { return values_[i]; }

 private:
  std::vector<AtomicRef<T>> values_;
};

// Few, since a taker that recalls everything has a step for each.
inline constexpr std::uint32_t kThreadNumbers = 2;

inline std::uint32_t thread_number() {
  return kvspan_test::explorer::thread_number() % kThreadNumbers;
}

inline void let_others_run() { kvspan_test::explorer::let_others_run(); }

}  // namespace kvspan
