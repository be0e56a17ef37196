// The functions of attention, on vectors. Coefficients are those of Cephes' exp2f and tanhf, good
// to about one unit in the last place.
#pragma once

#include "kernel/simd.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kMinusInfinity = -__builtin_inff();

// 2^x for x <= 0 or so; 0 below the normal numbers, so that what is masked weighs nothing.
KVSPAN_INLINE Floats exp2(Floats x) {
  const Floats least = splat(-126.0f);
  const Floats y = x < least ? least : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Floats magic = splat(0x1.8p23f);
  const Floats shifted = y + magic;
  const Floats r = y - (shifted - magic);
  Floats p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < least ? Floats{} : power;
}

KVSPAN_INLINE Floats tanh(Floats x) {
  const Floats magnitude = (Floats)((Ints)x & 0x7fffffff);
  const Floats z = x * x;
  Floats p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const Floats e = exp2(magnitude * (-2 * kLog2E));
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats with_sign = (Floats)((Ints)far | ((Ints)x & (Ints)splat(-0.0f)));
  return magnitude < 0.625f ? p : with_sign;
}

}  // namespace kvspan::flash::KVSPAN_LEVEL
