// The codebook as a table of pairs in shared memory: one load turns a packed byte into two elements of T.
//
//   word [byte][lane], 256 x 32 words = 32 KB     high half                   low half
//                                                 code[byte & 15], odd k      code[byte >> 4], even k
//   bank = lane: lane 0 -> 0, lane 1 -> 1, ..., lane 31 -> 31, whatever the bytes
//
// Each lane reads a copy in its own bank, so 32 random bytes take one cycle: 0.5 loads and 1.5 instructions a weight in
// all (sm_90, unscaled). Rejected: a single 1 KB copy, whose bank conflicts make a load 3.3 cycles; eight byte permutes
// on a table in registers, 2.21 instructions a weight, 2 of them on the ALU pipe, which has 1.6 at an H200's memory
// speed. WidePairTable takes 64 KB and 1.0 instructions: where a multiprocessor has one block, and one table.
//
// Rounding a level to the nearest bf16 gives all its weights the same error, which adds up where the mean of x is not
// zero (NF4, mean one sigma, K = 4096: 2.06 % of the output; dense bf16: 0.26 %). A named codebook comes from the host
// rounded so that the errors cancel (rounded_code.cpp); the kernel recognises it by its bits, since the host would have
// to wait for the device to read `code`. Any other codebook is dithered: an entry rounds up or down as often as the
// level's distance to both neighbours says, selected by the other level of the pair and by lane % 4, which both take
// all values within a row. Dithering lowers NF4's mean error from 2.4e-4 of absmax to 1.0e-5 and the slope's from
// 3.3e-4 to 4e-5, but raises the rms error from 6.1e-4 to 9.4e-4; and weights that repeat with the period of the lanes
// see one side only.
#pragma once

#include "kernels.h"

namespace nf4::cuda {

constexpr int kPairTableBytes = 256 * 32 * 4;
constexpr int kWidePairTableRow = 64;  // words
constexpr int kWidePairTableBytes = 256 * kWidePairTableRow * 4;

// A level's two neighbours in T and where it lies between them. Neither has a significand of all ones (rounded_code.cpp
// says why).
struct Rounding {
  uint32_t near_zero, away;  // the neighbour of smaller and of larger magnitude
  float fraction;            // of the way from near_zero to away; 0: exact, or NaN
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

// Bit reversal of a 4-bit number, which spreads a prefix of 0..15 evenly over 0..15.
NF4_DEVICE int reversed(int i) { return (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3; }

// The power of two at or below a codebook's largest level. Levels are divided and scales multiplied by it: no scale is
// then larger than the largest weight, and scales fit into fp16 where the weights do.
NF4_DEVICE float unit_of(const float* code) {
  float largest = 0;
  for (int level = 0; level < kLevels; ++level) largest = fmaxf(largest, fabsf(load_cached(code + level)));
  const uint32_t exponent = bits_of(largest) & 0x7f800000u;
  return exponent == 0 || exponent == 0x7f800000u ? 1.f : float_of(exponent);
}

// A byte's words for lane % 4 = 0..3, from a codebook that the host has not rounded.
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

// The index of the known codebook with exactly these bits, or -1.
NF4_DEVICE int find_known(const KnownCodes& known, const float* code) {
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

// All threads of the block build the table; a sync_block must follow. Returns the factor for the block scales.
template <class T, int kRow = 32>
NF4_DEVICE float build_pair_table(uint32_t* table, const ProductArgs& args) {
  const int found = find_known(args.known, args.weight.code);
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
    uint4* row = reinterpret_cast<uint4*>(table + byte * kRow);
    for (int i = 0; i < 8; ++i) row[(i + byte) % 8] = four;
  }
  return unit;
}

// This lane's copy of the table.
struct PairTable {
  uint32_t column;  // shared-memory address of its word for byte 0

  NF4_DEVICE PairTable(const uint32_t* words, int lane) : column(shared_address(words + lane)) {}

  // The two elements of byte i of a packed word: a permute, a multiply-add for the address, and a load.
  template <int i>
  NF4_DEVICE uint32_t pair(uint32_t word) const {
    return load_shared(column + permute_bytes(word, 0, 0x4440 + i) * 128);
  }
};

// The same in rows of 256 bytes, of which 128 are free for other use: the address within the table is the packed byte
// above the lane's, so that one permute makes it (1.0 instructions a weight, unscaled).
struct WidePairTable {
  uint32_t begin, column;

  NF4_DEVICE WidePairTable(const uint32_t* words, int lane)
      : begin(shared_address(words)), column(uint32_t(lane) * 4) {}

  template <int i>
  NF4_DEVICE uint32_t pair(uint32_t word) const {
    return load_shared(begin + permute_bytes(word, column, 0x5504 + 16 * i));
  }
};

}  // namespace nf4::cuda
