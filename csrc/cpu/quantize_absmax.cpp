// quantize_absmax: one superblock (256 scales) at a time; portable, being 1/block_size of the data.
#include <algorithm>

#include "../scale_bits.h"
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

void quantize_superblock_e4m3(const float* absmax, int64_t count, float scale_offset, float scale_absmax,
                              uint8_t* out) {
  const float factor = e4m3_factor(scale_absmax);
  for (int64_t i = 0; i < count; ++i) out[i] = e4m3_bits((absmax[i] - scale_offset) * factor);
}

void quantize_superblock_sorted(const float* absmax, int64_t count, float scale_offset, float scale_absmax,
                                const float* scale_code, uint8_t* out) {
  const float factor = sorted_factor(scale_absmax);
  float midpoints[kScaleMidpoints];
  for (int m = 0; m < kScaleMidpoints; ++m) midpoints[m] = scale_midpoint(scale_code, m);
  for (int64_t i = 0; i < count; ++i) out[i] = sorted_rank(midpoints, (absmax[i] - scale_offset) * factor);
}

}  // namespace nf4
