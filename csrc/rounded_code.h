// A codebook rounded to bf16 or fp16 so that the errors cancel, for products that multiply levels unscaled.
#pragma once

#include "format.h"

namespace nf4 {

// levels[i] * scale approximates code[i].
template <class T>
struct RoundedCode {
  T levels[kLevels];
  float scale;  // to be multiplied into the block scales
};

// T: BFloat16 or Float16. The first call for a codebook takes 2 ms; the result is kept.
template <class T>
RoundedCode<T> rounded_code(const float code[kLevels]);

}  // namespace nf4
