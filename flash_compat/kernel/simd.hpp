// Vectors as wide as the processor has them, in the words of the compiler's vector extensions: the
// kernel is written once and compiled once for each level (CMakeLists.txt), in a namespace of the
// level's name. Everything here is forced inline and uses no function of the standard library:
// whatever the linker could merge with another file's copy might be an instruction that this
// processor does not have.
#pragma once

#include <cstdint>
#include <utility>

#define KVSPAN_INLINE [[gnu::always_inline]] static inline
#if defined(__clang__)
#define KVSPAN_UNROLL _Pragma("unroll")
#else
#define KVSPAN_UNROLL _Pragma("GCC unroll 64")
#endif

namespace kvspan::flash::KVSPAN_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
// Half as wide and a quarter as wide: what fills a vector when widened.
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));
using SignedHalves = std::int16_t __attribute__((vector_size(2 * kLanes)));
using Octets = std::uint8_t __attribute__((vector_size(kLanes)));
using SignedOctets = std::int8_t __attribute__((vector_size(kLanes)));

// A chunk of head_dim.
struct Pair {
  Floats a, b;
};

template <class Vector>
KVSPAN_INLINE Vector load(const void* at) {
  Vector v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}

template <class Vector>
KVSPAN_INLINE void store(void* at, Vector v) {
  __builtin_memcpy(at, &v, sizeof v);
}

KVSPAN_INLINE Floats splat(float x) { return x - Floats{}; }
KVSPAN_INLINE Ints splat(std::int32_t x) { return x - Ints{}; }

KVSPAN_INLINE Floats max(Floats x, Floats y) { return x > y ? x : y; }

// Lane i of the result is lane From(i) of x, or, counted on from there, of y.
template <auto From, class Vector, int... i>
KVSPAN_INLINE Vector pick(Vector x, Vector y, std::integer_sequence<int, i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, From(i)...);
#else
  using Lane = decltype(x[0] + 0);
  using Indices [[gnu::vector_size(sizeof(Vector))]] = Lane;
  return __builtin_shuffle(x, y, Indices{From(i)...});
#endif
}
template <auto From, class Vector>
KVSPAN_INLINE Vector pick(Vector x, Vector y) {
  return pick<From>(x, y, std::make_integer_sequence<int, sizeof(Vector) / sizeof(x[0])>{});
}

KVSPAN_INLINE Ints lane_numbers() {
  return []<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    return Ints{i...};
  }(std::make_integer_sequence<int, kLanes>{});
}

// Lane i becomes the sum of the lanes of v[i]. Each step halves the number of vectors: it adds what
// lies Apart lanes from each other, and puts v[i]'s sums beside those of v[i + half].
template <int Apart = kLanes / 2>
KVSPAN_INLINE Floats transposed_sum(Floats* v) {
  if constexpr (Apart == 0) {
    return v[0];
  } else {
    constexpr auto low = [](int i) { return (i & Apart) ? i - Apart + kLanes : i; };
    constexpr auto high = [](int i) { return (i & Apart) ? i + kLanes : i + Apart; };
    KVSPAN_UNROLL for (int i = 0; i < Apart; ++i) {
      v[i] = pick<low>(v[i], v[i + Apart]) + pick<high>(v[i], v[i + Apart]);
    }
    return transposed_sum<Apart / 2>(v);
  }
}

// Every lane becomes the largest, or the sum, of the Group lanes that it stands among.
template <int Group>
KVSPAN_INLINE Floats max_of_group(Floats x) {
  if constexpr (Group > 1) {
    constexpr auto across = [](int i) { return i ^ (Group / 2); };
    x = max_of_group<Group / 2>(max(x, pick<across>(x, x)));
  }
  return x;
}
template <int Group>
KVSPAN_INLINE Floats sum_of_group(Floats x) {
  if constexpr (Group > 1) {
    constexpr auto across = [](int i) { return i ^ (Group / 2); };
    x = sum_of_group<Group / 2>(x + pick<across>(x, x));
  }
  return x;
}

KVSPAN_INLINE bool any(Ints mask) {
  std::int64_t parts[sizeof mask / 8];
  __builtin_memcpy(parts, &mask, sizeof mask);
  std::int64_t all = 0;
  KVSPAN_UNROLL for (std::int64_t part : parts) all |= part;
  return all != 0;
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
