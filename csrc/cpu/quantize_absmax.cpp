// quantize_absmax: one superblock (256 scales) at a time; portable, being 1/block_size of the data.
#include <algorithm>

#include "convert.h"
#include "kernels.h"

namespace nf4 {

double superblock_sum(const float* absmax, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += absmax[i];  // left to right: part of the format
  return sum;
}

float superblock_absmax(const float* absmax, int64_t count, float scale_offset) {
  int32_t largest = 0;  // as integers NaN is above all
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(absmax[i] - scale_offset));
  return float_of(uint32_t(largest));
}

static float at_least(float a, float least) { return a < least ? least : a; }

// fp32 to FP8 E4M3 (bias 7, no inf, NaN at 0x7f), nearest even; |a| stays within 448 here but for rounding.
static uint8_t e4m3_bits(float a) {
  const uint32_t u = bits_of(a), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x43f00000u) return uint8_t(sign | 0x7f);  // 480 and up, and NaN
  if (magnitude < 0x3c800000u) {                              // below 2^-6: the ulp of 16384.f is the subnormals' 2^-9
    return uint8_t(sign | (bits_of(float_of(magnitude) + 16384.f) - 0x46800000u));
  }
  return uint8_t(sign | (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20);
}

void quantize_superblock_e4m3(const float* absmax, int64_t count, float scale_offset, float scale_absmax,
                              uint8_t* out) {
  const float scale = 448.f / at_least(scale_absmax, 0x1p-100f);
  for (int64_t i = 0; i < count; ++i) out[i] = e4m3_bits((absmax[i] - scale_offset) * scale);
}

void quantize_superblock_sorted(const float* absmax, int64_t count, float scale_offset, float scale_absmax,
                                const float* scale_code, uint8_t* out) {
  const float scale = 1.f / at_least(scale_absmax, 0x1p-100f);
  float midpoints[255];
  for (int m = 0; m < 255; ++m) midpoints[m] = (scale_code[m] + scale_code[m + 1]) / 2;
  for (int64_t i = 0; i < count; ++i) {
    const float value = (absmax[i] - scale_offset) * scale;
    int rank = 0;  // how many midpoints are strictly below
    for (int step = 128; step > 0; step /= 2) rank += step * int(value > midpoints[rank + step - 1]);
    out[i] = uint8_t(rank);
  }
}

}  // namespace nf4
