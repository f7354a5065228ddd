// A codebook rounded to bf16 or fp16 so that the errors cancel, for products that multiply levels unscaled.
#pragma once

#include "format.h"

namespace nf4 {

// scale * levels is about the codebook.
template <class T>
struct RoundedCode {
  T levels[kLevels];
  float scale;  // goes into the block scales
};

// T: BFloat16 or Float16. The first time for a codebook takes 2 ms, from then on it is kept.
template <class T>
RoundedCode<T> rounded_code(const float code[kLevels]);

}  // namespace nf4
