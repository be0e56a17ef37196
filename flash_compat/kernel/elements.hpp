// Numbers as they are stored, and vectors of floats: the one place that has intrinsics besides
// product.hpp, where the vector extensions have no word for an instruction.
//
// A stored type says how a chunk (two vectors) is loaded, in whatever order is cheapest, and how a
// chunk in that order is told from one in the order of memory.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernel/problem.hpp"
#include "kernel/simd.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

// Half precision, by the instruction for it, or by moving the bits: a multiplication sets the
// exponent right, also of subnormal numbers.
KVSPAN_INLINE Floats from_half(Halves h) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16((float16x4_t)h);
#else
  const Words bits = __builtin_convertvector(h, Words);
  const Words magnitude = (bits & 0x7fff) << 13;
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = magnitude | 0x7f800000;
  return (Floats)((magnitude >= 0x0f800000 ? special : finite) | ((bits & 0x8000) << 16));
#endif
}

KVSPAN_INLINE Halves to_half(Floats x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
  const Words sign = (Words)x & 0x80000000;
  const Words bits = (Words)x ^ sign;
  // Subnormal in half precision: adding 0.5 leaves 2^-24 as the last place. Else round to even.
  const Words small = (Words)((Floats)bits + 0.5f) - 0x3f000000;
  const Words normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Words large = bits > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words half = bits < 0x38800000 ? small : bits < 0x477ff000 ? normal : large;
  return __builtin_convertvector(half | (sign >> 16), Halves);
#endif
}

// Round to even; NaN stays NaN.
KVSPAN_INLINE Halves to_bfloat16(Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((Words)(x != x) != 0 ? quiet : rounded, Halves);
}

// Most are loaded in the order of memory.
struct InOrder {
  KVSPAN_INLINE Pair from_order(Pair x) { return x; }
  KVSPAN_INLINE Pair in_order(Pair x) { return x; }
};

struct Float32 : InOrder {
  static constexpr int kBytes = 4;
  KVSPAN_INLINE Pair load_chunk(const char* at) {
    return {load<Floats>(at), load<Floats>(at + sizeof(Floats))};
  }
};

// The even numbers, then the odd ones: each is half of a word, and as a float the word itself.
struct BFloat16 {
  static constexpr int kBytes = 2;
  KVSPAN_INLINE Pair load_chunk(const char* at) {
    const Words words = load<Words>(at);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000)};
  }
  KVSPAN_INLINE Pair from_order(Pair x) {
    constexpr auto even = [](int i) { return 2 * i; };
    constexpr auto odd = [](int i) { return 2 * i + 1; };
    return {pick<even>(x.a, x.b), pick<odd>(x.a, x.b)};
  }
  KVSPAN_INLINE Pair in_order(Pair x) {
    constexpr auto first = [](int i) { return i / 2 + (i & 1) * kLanes; };
    constexpr auto second = [](int i) { return (i + kLanes) / 2 + (i & 1) * kLanes; };
    return {pick<first>(x.a, x.b), pick<second>(x.a, x.b)};
  }
};

struct Float16 : InOrder {
  static constexpr int kBytes = 2;
  KVSPAN_INLINE Pair load_chunk(const char* at) {
    return {from_half(load<Halves>(at)), from_half(load<Halves>(at + sizeof(Halves)))};
  }
};

// Bytes widened. (GCC 12 knows these instructions, but not for vectors as wide as it has them.)
KVSPAN_INLINE Halves to_halves(Octets x) {
#if defined(__AVX512F__)
  return (Halves)_mm256_cvtepu8_epi16((__m128i)x);
#elif defined(__AVX2__)
  return (Halves)_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)x));
#else
  return __builtin_convertvector(x, Halves);
#endif
}
KVSPAN_INLINE Ints to_integers(SignedOctets x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x));
#else
  return __builtin_convertvector(__builtin_convertvector(x, SignedHalves), Ints);
#endif
}

// One byte a number, in order.
template <class Number>
struct OneByte : InOrder {
  static constexpr int kBytes = 1;
  KVSPAN_INLINE Pair load_chunk(const char* at) {
    return {Number::widen(load<Octets>(at)), Number::widen(load<Octets>(at + kLanes))};
  }
};

struct Int8 : OneByte<Int8> {
  KVSPAN_INLINE Floats widen(Octets x) {
    return __builtin_convertvector(to_integers((SignedOctets)x), Floats);
  }
};

// The high byte of a half-precision number.
struct Float8E5M2 : OneByte<Float8E5M2> {
  KVSPAN_INLINE Floats widen(Octets x) { return from_half(to_halves(x) << 8); }
};

// A half-precision number but for the exponent's bias. It has no infinities: all ones is NaN.
struct Float8E4M3 : OneByte<Float8E4M3> {
  KVSPAN_INLINE Floats widen(Octets x) {
    const Halves bits = to_halves(x);
    const Halves magnitude = (bits & 0x7f) << 7;
    const Halves not_a_number = Halves{} + 0x7e00;
    const Halves number = magnitude == 0x3f80 ? not_a_number : magnitude;
    return from_half(number | ((bits & 0x80) << 8)) * 0x1p8f;
  }
};

// ---- queries and outputs, whose type is known at run time only ----

KVSPAN_INLINE Pair load_chunk(Element element, const char* at) {
  if (element == Element::float32) return Float32::load_chunk(at);
  if (element == Element::float16) return Float16::load_chunk(at);
  const auto wide = [](const char* half) __attribute__((always_inline)) {
    return (Floats)(__builtin_convertvector(load<Halves>(half), Words) << 16);
  };
  return {wide(at), wide(at + sizeof(Halves))};
}

KVSPAN_INLINE void store_chunk(Element element, char* at, Pair x) {
  if (element == Element::float32) {
    store(at, x.a);
    store(at + sizeof(Floats), x.b);
  } else if (element == Element::float16) {
    store(at, to_half(x.a));
    store(at + sizeof(Halves), to_half(x.b));
  } else {
    store(at, to_bfloat16(x.a));
    store(at + sizeof(Halves), to_bfloat16(x.b));
  }
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
