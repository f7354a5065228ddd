// x as whole numbers of 15 bits and a sign, by a step for each 64 k of a row: what linear_gemv_int.h multiplies with Int13.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int kWholeGroupK = 64;
constexpr int kGemvIntMaxM = 16;  // rows of x; fp32 products are faster from there on
constexpr float kWholeMax = 32767.f;
constexpr float kLevelStep = 0x1p-12f;  // of Int13
constexpr float kLeastMax = 0x1p-96f;   // so that its step is not subnormal

// x * factor are the whole numbers; a whole number times Int13's is `step` times their product, NaN where x has no
// finite largest element.
struct WholeStep {
  float factor, step;
};
template <class T>
WholeStep step_of(const T* x) {
  const float max = Isa::max_abs(x, kWholeGroupK), bounded = max < kLeastMax ? kLeastMax : max;
  return {kWholeMax / bounded, max <= 3.4028235e38f ? bounded / kWholeMax * kLevelStep : float_of(0x7fc00000u)};
}

}  // namespace
}  // namespace nf4::cpu
