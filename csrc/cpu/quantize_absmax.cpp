// quantize_absmax: one superblock (256 scales) at a time; portable, being 1/block_size of the data.
//
//   scale_offset = mean of absmax in fp64      scale_absmax[s] = max |absmax - scale_offset| over superblock s
#include <algorithm>

#include "../scale_bits.h"
#include "convert.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kSuperblock = int64_t(1) << kSuperblockShift;

struct Superblock {
  const float* absmax;
  int64_t count;
};
Superblock superblock(const QuantizeAbsmaxArgs& args, int64_t s) {
  return {args.absmax + s * kSuperblock, std::min(kSuperblock, args.blocks - s * kSuperblock)};
}

float max_distance(const Superblock& block, float scale_offset) {
  int32_t largest = 0;  // as integers NaN is above all
  for (int64_t i = 0; i < block.count; ++i) largest = std::max(largest, magnitude(block.absmax[i] - scale_offset));
  return float_of(uint32_t(largest));
}

void quantize_e4m3(const Superblock& block, float scale_offset, float scale_absmax, uint8_t* out) {
  const float factor = e4m3_factor(scale_absmax);
  for (int64_t i = 0; i < block.count; ++i) out[i] = e4m3_bits((block.absmax[i] - scale_offset) * factor);
}

void quantize_sorted(const Superblock& block, float scale_offset, float scale_absmax, const float* scale_code,
                     uint8_t* out) {
  const float factor = sorted_factor(scale_absmax);
  float midpoints[kScaleMidpoints];
  for (int m = 0; m < kScaleMidpoints; ++m) midpoints[m] = scale_midpoint(scale_code, m);
  for (int64_t i = 0; i < block.count; ++i) out[i] = sorted_rank(midpoints, (block.absmax[i] - scale_offset) * factor);
}

}  // namespace

int64_t superblocks_of(int64_t blocks) { return ceil_div(blocks, kSuperblock); }

// The order of both sums, left to right, is part of the format.
void sum_superblocks(const QuantizeAbsmaxArgs& args, int64_t begin, int64_t end, double* sums) {
  for (int64_t s = begin; s < end; ++s) {
    const Superblock block = superblock(args, s);
    double sum = 0;
    for (int64_t i = 0; i < block.count; ++i) sum += block.absmax[i];
    sums[s] = sum;
  }
}
float mean_absmax(const QuantizeAbsmaxArgs& args, const double* sums) {
  double total = 0;
  for (int64_t s = 0; s < superblocks_of(args.blocks); ++s) total += sums[s];
  return args.blocks == 0 ? 0.f : float(total / double(args.blocks));
}

void quantize_superblocks(const QuantizeAbsmaxArgs& args, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const Superblock block = superblock(args, s);
    const float scale_absmax = args.scale_absmax[s] = max_distance(block, args.scale_offset);
    uint8_t* out = args.quantized + s * kSuperblock;
    if (args.scale_is_e4m3)
      quantize_e4m3(block, args.scale_offset, scale_absmax, out);
    else
      quantize_sorted(block, args.scale_offset, scale_absmax, args.scale_code, out);
  }
}

}  // namespace nf4::cpu
