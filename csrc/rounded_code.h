// A codebook rounded to bf16, fp16 or Int13 so that the errors cancel, for products that multiply levels unscaled.
#pragma once

#include "format.h"

namespace nf4 {

// A whole number of 13 bits and a sign, in units of 2^-12: at most 8191 / 4096.
struct Int13 {
  uint16_t bits;  // the magnitude, and bit 15 as the sign, so that the next number away from zero is bits + 1
};
static inline int whole_number(Int13 a) { return (a.bits & 0x8000) != 0 ? -(a.bits & 0x7fff) : a.bits; }

// levels[i] * scale approximates code[i]. Levels that are NaN or inf stay so; Int13, which has neither, has a NaN scale.
template <class T>
struct RoundedCode {
  T levels[kLevels];
  float scale;  // to be multiplied into the block scales
};

// T: BFloat16, Float16 or Int13. The first call for a codebook takes 2 ms; the result is kept.
template <class T>
RoundedCode<T> rounded_code(const float code[kLevels]);

}  // namespace nf4
