// 16 levels of 16 bits in two registers, for lookups by tbl.
//
// A lookup of 16 codes is a tbl for the low bytes of the levels and one for the high bytes; two zips make elements of
// them: 4 instructions for 16 values, where fp32 levels take 12. The levels are those of the codebook, rounded without
// bias (rounded_code.cpp) and scaled later; or times a block's scale, rounded once as a decoded weight is, so with its
// bits: 10 instructions for all weights of the block.
#pragma once

#include "decode_span.h"

namespace nf4::cpu {
namespace {

struct CodeTable {
  uint8x16_t low, high;  // bytes of the 16 levels

  template <class T>
  explicit CodeTable(const RoundedCode<T>& code) {
    const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(code.levels));
    low = bytes.val[0];
    high = bytes.val[1];
  }
  // Of elements of type T, which is BFloat16 or Float16.
  template <class T>
  CodeTable(T, const float32x4x4_t& levels, float scale) {
    const auto scaled = [&](int i) {
      const Isa::F products = {vmulq_n_f32(levels.val[i], scale), vmulq_n_f32(levels.val[i + 1], scale)};
      return vreinterpretq_u8_u16(Isa::round_to(T{}, products));
    };
    const uint8x16_t first = scaled(0), last = scaled(2);
    low = vuzp1q_u8(first, last);
    high = vuzp2q_u8(first, last);
  }
  // The values of 16 codes in their order: 0-7 and 8-15.
  void values(uint8x16_t codes, uint16x8_t& first, uint16x8_t& last) const {
    const uint8x16_t low_bytes = vqtbl1q_u8(low, codes), high_bytes = vqtbl1q_u8(high, codes);
    first = vreinterpretq_u16_u8(vzip1q_u8(low_bytes, high_bytes));
    last = vreinterpretq_u16_u8(vzip2q_u8(low_bytes, high_bytes));
  }
};

static inline uint8x16_t even_codes(uint8x16_t packed) { return vshrq_n_u8(packed, 4); }
static inline uint8x16_t odd_codes(uint8x16_t packed) { return vandq_u8(packed, vdupq_n_u8(15)); }
static inline uint8x16_t load_8_bytes(const uint8_t* p) { return vcombine_u8(vld1_u8(p), vdup_n_u8(0)); }

// decode_span by a table of each block's values: for 64 weights 50 instructions instead of 144 (232 without bfcvtn).
static inline void decode_span_by_tables(const Weight& w, int64_t begin, int64_t count, float* out) {
  decode_span(w, begin, count, out);
}
template <class T>
void decode_span_by_tables(const Weight& w, int64_t begin, int64_t count, T* out) {
  const float32x4x4_t levels = vld1q_f32_x4(w.code);
  while (count > 0) {
    const int64_t block = begin >> w.block_shift, left = ((block + 1) << w.block_shift) - begin;
    const int64_t run = count < left ? count : left;
    const float scale = block_scale(w, block);
    const CodeTable table(T{}, levels, scale);
    const auto decode_one = [&](int64_t i) { out[i] = from_float<T>(w.code[nibble(w.packed, begin + i)] * scale); };
    const auto store_16 = [&](int64_t i, uint8x16_t codes) {
      uint16x8_t halves[2];
      table.values(codes, halves[0], halves[1]);
      Isa::store_bits(out + i, halves[0]);
      Isa::store_bits(out + i + 8, halves[1]);
    };
    int64_t i = begin % 2;
    if (i == 1) decode_one(0);
    for (; i + 32 <= run; i += 32) {
      const uint8x16_t bytes = vld1q_u8(w.packed + (begin + i) / 2);
      store_16(i, vzip1q_u8(even_codes(bytes), odd_codes(bytes)));
      store_16(i + 16, vzip2q_u8(even_codes(bytes), odd_codes(bytes)));
    }
    if (i + 16 <= run) {
      const uint8x16_t bytes = load_8_bytes(w.packed + (begin + i) / 2);
      store_16(i, vzip1q_u8(even_codes(bytes), odd_codes(bytes)));
      i += 16;
    }
    for (; i < run; ++i) decode_one(i);
    begin += run;
    out += run;
    count -= run;
  }
}

}  // namespace
}  // namespace nf4::cpu
