// The codebook as a table of pairs in shared memory: one load turns a packed byte into two elements of T.
//
//   table[byte][lane] = { code[byte >> 4] in the low half, code[byte & 15] in the high half }, 256 x 32 words, 32 KB
//
// Each lane has a copy in its own bank, so that 32 random bytes take one cycle: 0.5 loads and 1.5 instructions a weight
// in all (sm_90, unscaled). A single 1 KB copy has conflicts: 3.3 cycles a load; eight byte permutes on a table in
// registers: 2.21 instructions a weight, 2 of them on the ALU pipe, which has 1.6 at an H200's memory speed.
//
// Rounding a level to bf16 by nearest gives all its weights the same error, which an x whose mean is not zero adds up
// (NF4, mean one sigma, K = 4096: 2.06 % of the output; dense bf16: 0.26 %). A codebook that has a name comes rounded so
// that the errors cancel (rounded_code.cpp), and is found by its bits: to have the host look at `code` would wait for the
// device. Any other is rounded up in some entries and down in others, as often as its distance to both neighbours says:
// by the other level of the pair and by lane % 4, which both run through all values within a row. NF4's mean error falls
// so from 2.4e-4 of absmax to 1.0e-5, the slope's from 3.3e-4 to 4e-5, but the rms error rises from 6.1e-4 to 9.4e-4; and
// weights that repeat with the period of the lanes see one side of it only.
#pragma once

#include "kernels.h"

namespace nf4::cuda {

constexpr int kPairTableBytes = 256 * 32 * 4;

// The two neighbours of a level in T, `near_zero` the lower in magnitude, and where the level is between them. None has a
// significand of all ones, see rounded_code.cpp.
struct Rounding {
  uint32_t near_zero, away;
  float fraction;  // 0: exact, or NaN
};

template <class T>
NF4_DEVICE Rounding rounding(float level) {
  T low = from_float<T>(level);
  if (fabsf(to_float(low)) > fabsf(level)) low.bits = uint16_t(low.bits - 1);
  T high = {uint16_t(low.bits + 1)};
  const auto is_all_ones = [](T a) { return (a.bits & T::kFraction) == T::kFraction; };
  if (is_all_ones(low)) low.bits = uint16_t(low.bits - 1);
  if (is_all_ones(high)) high.bits = uint16_t(high.bits + 1);
  return {low.bits, high.bits, (level - to_float(low)) / (to_float(high) - to_float(low))};
}

NF4_DEVICE uint32_t round_above(const Rounding& level, float threshold) {
  return level.fraction > threshold ? level.away : level.near_zero;
}

// Bits of a 4-bit number in reverse: a prefix of 0..15 is spread evenly over 0..15.
NF4_DEVICE int reversed(int i) { return (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3; }

// The power of two below a codebook's largest level: by it the levels are divided and scales multiplied, which then are
// no larger than the largest weight, and fit into fp16 where the weights do.
NF4_DEVICE float unit_of(const float* code) {
  float largest = 0;
  for (int level = 0; level < kLevels; ++level) largest = fmaxf(largest, fabsf(load_cached(code + level)));
  const uint32_t exponent = bits_of(largest) & 0x7f800000u;
  return exponent == 0 || exponent == 0x7f800000u ? 1.f : float_of(exponent);
}

// The words of a byte for lanes with lane % 4 = 0..3, from a codebook that nobody has rounded.
template <class T>
NF4_DEVICE uint4 dithered(const float* code, float unit, int first, int second) {
  const Rounding low = rounding<T>(code[first] / unit), high = rounding<T>(code[second] / unit);
  const auto word = [&](float quarter) {
    const float for_first = (quarter + (float(reversed(second)) + 0.5f) / 16) / 4;
    const float for_second = (quarter + (float(reversed(first)) + 0.5f) / 16) / 4;
    return round_above(low, for_first) | round_above(high, for_second) << 16;
  };
  return make_uint4(word(0), word(2), word(1), word(3));
}

// Which of the known codebooks this is, bit for bit, or -1.
NF4_DEVICE int find(const KnownCodes& known, const float* code) {
#pragma unroll 1
  for (int i = 0; i < known.count; ++i) {
    uint32_t different = 0;
#pragma unroll
    for (int level = 0; level < kLevels; ++level)
      different |= bits_of(load_cached(code + level)) ^ bits_of(known.entries[i].code[level]);
    if (different == 0) return i;
  }
  return -1;
}

// By the whole block; a sync_block must follow. Returns the factor of the block scales that goes with the table.
template <class T>
NF4_DEVICE float build_pair_table(uint32_t* table, const ProductArgs& args) {
  const int found = find(args.known, args.weight.code);
  const float unit = found < 0 ? unit_of(args.weight.code) : args.known.entries[found].scale;
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const int first = byte >> 4, second = byte & 15;
    uint4 four;
    if (found < 0) {
      four = dithered<T>(args.weight.code, unit, first, second);
    } else {
      const uint16_t* levels = args.known.entries[found].levels;
      const uint32_t word = levels[first] | uint32_t(levels[second]) << 16;
      four = make_uint4(word, word, word, word);
    }
    uint4* row = reinterpret_cast<uint4*>(table + byte * 32);
    for (int i = 0; i < 8; ++i) row[(i + byte) % 8] = four;
  }
  return unit;
}

// This lane's column of the table.
struct PairTable {
  uint32_t column;  // its address in shared memory

  NF4_DEVICE PairTable(const uint32_t* words, int lane) : column(shared_address(words + lane)) {}

  // The two elements of byte i of a packed word: a permute, a multiply-add for the address, a load.
  template <int i>
  NF4_DEVICE uint32_t pair(uint32_t word) const {
    return load_shared(column + permute_bytes(word, 0, 0x4440 + i) * 128);
  }
};

}  // namespace nf4::cuda
