// What the bf16 products of NEON share: codes looked up as bf16, and the scales of many blocks.
//
// A lookup of 16 codes is a tbl for the low bytes of the levels and one for the high bytes; two zips make bf16 of them:
// 4 instructions for 16 values, where fp32 levels take 12. The levels are those of the codebook, rounded without bias
// (rounded_code.cpp) and scaled later; or times a block's scale, rounded once as a decoded weight is: 10 instructions
// for all weights of the block.
#pragma once

#include "decode_neon.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

struct CodeTable {
  uint8x16_t low, high;  // bytes of the 16 levels

  CodeTable() = default;
  explicit CodeTable(const RoundedCode<BFloat16>& code) {
    const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(code.levels));
    low = bytes.val[0];
    high = bytes.val[1];
  }
  CodeTable(const float32x4x4_t& levels, float scale) {
    const auto scaled = [&](int i) -> Isa::F {
      return {vmulq_n_f32(levels.val[i], scale), vmulq_n_f32(levels.val[i + 1], scale)};
    };
    const uint8x16_t first = vreinterpretq_u8_u16(Isa::round_bf16(scaled(0)));
    const uint8x16_t last = vreinterpretq_u8_u16(Isa::round_bf16(scaled(2)));
    low = vuzp1q_u8(first, last);
    high = vuzp2q_u8(first, last);
  }
  // The values of 16 codes in their order: 0-7 and 8-15.
  void values(uint8x16_t codes, bfloat16x8_t& first, bfloat16x8_t& last) const {
    const uint8x16_t low_bytes = vqtbl1q_u8(low, codes), high_bytes = vqtbl1q_u8(high, codes);
    first = vreinterpretq_bf16_u8(vzip1q_u8(low_bytes, high_bytes));
    last = vreinterpretq_bf16_u8(vzip2q_u8(low_bytes, high_bytes));
  }
};

static inline uint8x16_t even_codes(uint8x16_t packed) { return vshrq_n_u8(packed, 4); }
static inline uint8x16_t odd_codes(uint8x16_t packed) { return vandq_u8(packed, vdupq_n_u8(15)); }
static inline uint8x16_t load_8_bytes(const uint8_t* p) { return vcombine_u8(vld1_u8(p), vdup_n_u8(0)); }

static inline bfloat16x8_t load_bf16(const BFloat16* p) { return vreinterpretq_bf16_u16(Isa::load_bits(p)); }
static inline void store_bf16(BFloat16* p, bfloat16x8_t a) { Isa::store_bits(p, vreinterpretq_u16_bf16(a)); }

// scales[i] of block(i), i < count: their kind is asked for once, not in the loop.
template <class Block>
static inline void gather_scales(const Weight& w, int64_t count, Block block, float* scales) {
  const auto gather_numbers = [&](auto number) {
    const auto* absmax = w.absmax_as<decltype(number)>();
    for (int64_t i = 0; i < count; ++i) scales[i] = to_float(absmax[block(i)]);
  };
  switch (w.scales) {
    case Scales::kFloat32: return gather_numbers(float{});
    case Scales::kBFloat16: return gather_numbers(BFloat16{});
    case Scales::kFloat16: return gather_numbers(Float16{});
    default: break;
  }
  const auto* absmax = w.absmax_as<uint8_t>();
  const float* code = w.scale_code;
  if (w.scales == Scales::kCodes) {
    for (int64_t i = 0; i < count; ++i) scales[i] = code[absmax[block(i)]];
    return;
  }
  const float* superblocks = w.scale_absmax;
  const float offset = *w.scale_offset;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = block(i);
    const float product = code[absmax[b]] * superblocks[b >> kSuperblockShift];
    scales[i] = product + offset;
  }
}

}  // namespace
}  // namespace nf4::cpu
