// The 8-bit code of one block's scale, for C++ and CUDA: value = absmax - scale_offset, scaled by its superblock.
//
//   e4m3     the FP8 pattern of value * e4m3_factor(scale_absmax), nearest even
//   sorted   the number of midpoints of the ascending map strictly below value * sorted_factor(scale_absmax)
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"

namespace nf4 {

constexpr float kLeastScaleAbsmax = 0x1p-100f;  // so that the factors are finite
constexpr int kScaleMidpoints = 255;

NF4_HOST_DEVICE static inline float e4m3_factor(float scale_absmax) {
  return 448.f / (scale_absmax < kLeastScaleAbsmax ? kLeastScaleAbsmax : scale_absmax);
}
NF4_HOST_DEVICE static inline float sorted_factor(float scale_absmax) {
  return 1.f / (scale_absmax < kLeastScaleAbsmax ? kLeastScaleAbsmax : scale_absmax);
}

// fp32 to FP8 E4M3 (bias 7, no inf, NaN at 0x7f), nearest even; |a| stays within 448 here but for rounding.
NF4_HOST_DEVICE static inline uint8_t e4m3_bits(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  const uint32_t sign = u >> 24 & 0x80, magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x43f00000u) return uint8_t(sign | 0x7f);  // 480 and up, and NaN
  if (magnitude < 0x3c800000u) {                              // below 2^-6: the ulp of 16384.f is the subnormals' 2^-9
    const float shifted = (a < 0 ? -a : a) + 16384.f;
    std::memcpy(&u, &shifted, 4);
    return uint8_t(sign | (u - 0x46800000u));
  }
  return uint8_t(sign | (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20);
}

NF4_HOST_DEVICE static inline float scale_midpoint(const float* scale_code, int i) {
  return (scale_code[i] + scale_code[i + 1]) / 2;
}
NF4_HOST_DEVICE static inline uint8_t sorted_rank(const float midpoints[kScaleMidpoints], float a) {
  int rank = 0;
  for (int step = 128; step > 0; step /= 2) rank += step * int(a > midpoints[rank + step - 1]);
  return uint8_t(rank);
}

}  // namespace nf4
