// The kernels' vocabulary for NEON, which every aarch64 has: 8 fp32 lanes in two registers. See decode_scalar.h for what
// each function means.
//
// Lookup: the levels' bytes stand apart, byte b of all 16 in one register, so that a tbl on 16 codes gives byte b of
// their 16 values; two rounds of zip put the bytes together: 12 instructions for 16 values. (A tbl on the levels as
// they lie takes four registers, and an index for each byte of a value.)
//
//   codes, bytes    | 8 even codes | 8 odd codes |
//   tbl of byte b   | byte b of 8 even values | of 8 odd ones |            b = 0 .. 3
//   zip             | bytes 0, 1 of .. |  | bytes 2, 3 of .. |  and then whole values: even 0-3, 4-7, odd 0-3, 4-7
//
// Compiled with +bf16 it rounds to bf16 by bfcvtn, which keeps subnormals and rounds to nearest even.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../format.h"
#include "convert.h"

namespace nf4::cpu {
namespace {

struct Isa {
  static constexpr int L = 8;
  static constexpr int kTileM = 5;  // 5 x 2 accumulators of two registers, 4 of weights and 5 of x: 29 of 32
  struct F {
    float32x4_t low, high;
  };
  struct I {
    uint32x4_t low, high;
  };
  struct Table {
    uint8x16_t bytes[4];
  };

  static F set1(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
  static F set_halves(float low, float high) { return {vdupq_n_f32(low), vdupq_n_f32(high)}; }
  static F zero() { return set1(0.f); }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static uint16x8_t load_bits(const void* p) {
    uint16x8_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static void store_bits(void* p, uint16x8_t bits) { std::memcpy(p, &bits, sizeof bits); }
  static F load(const BFloat16* p) {
    const uint16x8_t bits = load_bits(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
  }
  static F load(const Float16* p) {
    const float16x8_t bits = vreinterpretq_f16_u16(load_bits(p));
    return {vcvt_f32_f16(vget_low_f16(bits)), vcvt_high_f32_f16(bits)};
  }
  static void load_pairs(const float* p, F& even, F& odd) {
    const float32x4x2_t low = vld2q_f32(p), high = vld2q_f32(p + L);
    even = {low.val[0], high.val[0]};
    odd = {low.val[1], high.val[1]};
  }
  static void load_pairs(const BFloat16* p, F& even, F& odd) {
    const uint32x4_t low = vreinterpretq_u32_u16(load_bits(p)), high = vreinterpretq_u32_u16(load_bits(p + L));
    const uint32x4_t odd_half = vdupq_n_u32(0xffff0000u);
    even = {vreinterpretq_f32_u32(vshlq_n_u32(low, 16)), vreinterpretq_f32_u32(vshlq_n_u32(high, 16))};
    odd = {vreinterpretq_f32_u32(vandq_u32(low, odd_half)), vreinterpretq_f32_u32(vandq_u32(high, odd_half))};
  }
  static void load_pairs(const Float16* p, F& even, F& odd) {
    const uint16x8_t low = load_bits(p), high = load_bits(p + L);
    const float16x8_t evens = vreinterpretq_f16_u16(vuzp1q_u16(low, high));
    const float16x8_t odds = vreinterpretq_f16_u16(vuzp2q_u16(low, high));
    even = {vcvt_f32_f16(vget_low_f16(evens)), vcvt_high_f32_f16(evens)};
    odd = {vcvt_f32_f16(vget_low_f16(odds)), vcvt_high_f32_f16(odds)};
  }

  // 8 elements of 16 bits, rounded to nearest even.
  static uint16x8_t round_to(Float16, F a) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high));
  }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  static uint16x8_t round_to(BFloat16, F a) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a.low), a.high));
  }
#else
  // In the high half of each lane; a NaN becomes the quiet NaN.
  static uint32x4_t round_bf16(float32x4_t a) {
    const uint32x4_t u = vreinterpretq_u32_f32(a), lsb = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(lsb, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000u));
  }
  static uint16x8_t round_to(BFloat16, F a) {
    return vuzp2q_u16(vreinterpretq_u16_u32(round_bf16(a.low)), vreinterpretq_u16_u32(round_bf16(a.high)));
  }
#endif
  static void store(float* p, F a) {
    vst1q_f32(p, a.low);
    vst1q_f32(p + 4, a.high);
  }
  static void store(BFloat16* p, F a) { store_bits(p, round_to(BFloat16{}, a)); }
  static void store(Float16* p, F a) { store_bits(p, round_to(Float16{}, a)); }
  static void store_pairs(float* p, F even, F odd) {
    vst2q_f32(p, {{even.low, odd.low}});
    vst2q_f32(p + L, {{even.high, odd.high}});
  }
  static void store_pairs_of_bits(void* p, uint16x8_t even, uint16x8_t odd) {
    store_bits(p, vzip1q_u16(even, odd));
    store_bits(static_cast<char*>(p) + 16, vzip2q_u16(even, odd));
  }
  static void store_pairs(BFloat16* p, F even, F odd) {
    store_pairs_of_bits(p, round_to(BFloat16{}, even), round_to(BFloat16{}, odd));
  }
  static void store_pairs(Float16* p, F even, F odd) {
    store_pairs_of_bits(p, round_to(Float16{}, even), round_to(Float16{}, odd));
  }

  static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  static float reduce_add(F a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }

  template <class T>
  static float max_abs(const T* p, int count) {
    return max_magnitude(p, count);
  }

  static Table load_table(const float* p) {
    const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(p));
    return {{planes.val[0], planes.val[1], planes.val[2], planes.val[3]}};
  }
  // Of bytes 0 .. 3 of 16 values: the first 8, and the last 8.
  static F first_values(const uint8x16_t (&bytes)[4]) {
    const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(bytes[0], bytes[1]));
    const uint16x8_t high = vreinterpretq_u16_u8(vzip1q_u8(bytes[2], bytes[3]));
    return {vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high))};
  }
  static F last_values(const uint8x16_t (&bytes)[4]) {
    const uint16x8_t low = vreinterpretq_u16_u8(vzip2q_u8(bytes[0], bytes[1]));
    const uint16x8_t high = vreinterpretq_u16_u8(vzip2q_u8(bytes[2], bytes[3]));
    return {vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high))};
  }
  // Of 16 codes: the first 8, and the last 8.
  static void values_of(const Table& t, uint8x16_t codes, F& first, F& last) {
    const uint8x16_t bytes[4] = {vqtbl1q_u8(t.bytes[0], codes), vqtbl1q_u8(t.bytes[1], codes),
                                 vqtbl1q_u8(t.bytes[2], codes), vqtbl1q_u8(t.bytes[3], codes)};
    first = first_values(bytes);
    last = last_values(bytes);
  }
  // The low byte of each lane, twice.
  static uint8x16_t low_bytes(I a) {
    const uint16x8_t halves = vuzp1q_u16(vreinterpretq_u16_u32(a.low), vreinterpretq_u16_u32(a.high));
    return vuzp1q_u8(vreinterpretq_u8_u16(halves), vreinterpretq_u8_u16(halves));
  }
  static F lookup(const Table& t, I index) {
    F values, again;
    values_of(t, vandq_u8(low_bytes(index), vdupq_n_u8(15)), values, again);
    return values;
  }
  template <int BYTE>
  static void lookup_nibbles(const Table& t, I words, F& high, F& low) {
    constexpr uint8_t kBytes[16] = {BYTE, BYTE + 4, BYTE + 8, BYTE + 12, BYTE + 16, BYTE + 20, BYTE + 24, BYTE + 28,
                                    BYTE, BYTE + 4, BYTE + 8, BYTE + 12, BYTE + 16, BYTE + 20, BYTE + 24, BYTE + 28};
    constexpr int8_t kShifts[16] = {-4, -4, -4, -4, -4, -4, -4, -4};
    const uint8x16x2_t source = {{vreinterpretq_u8_u32(words.low), vreinterpretq_u8_u32(words.high)}};
    const uint8x16_t nibbles = vshlq_u8(vqtbl2q_u8(source, vld1q_u8(kBytes)), vld1q_s8(kShifts));
    values_of(t, vandq_u8(nibbles, vdupq_n_u8(15)), high, low);
  }
  static void decode_pairs(const uint8_t* p, const Table& t, F& even, F& odd) {
    const uint8x8_t packed = vld1_u8(p);
    values_of(t, vcombine_u8(vshr_n_u8(packed, 4), vand_u8(packed, vdup_n_u8(15))), even, odd);
  }
  // A 4x4 transpose of 32-bit words, of rows 0-3 and of rows 4-7.
  static void transpose(const uint8_t* const rows[4], int64_t byte, uint32x4_t words[4]) {
    uint32x4_t row[4];
    for (int i = 0; i < 4; ++i) row[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + byte));
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(row[0], row[1]));
    const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(row[0], row[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(row[2], row[3]));
    const uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(row[2], row[3]));
    words[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    words[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    words[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    words[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
  }
  static F load_int8(const uint8_t* p) {
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
  }
  static I load_words16(const uint8_t* p) {
    const uint16x8_t words = load_bits(p);
    return {vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words)};
  }
  template <int BYTE>
  static float32x4_t signed_byte(uint32x4_t words) {
    return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(vshlq_n_u32(words, 24 - 8 * BYTE)), 24));
  }
  template <int BYTE>
  static F signed_byte(I words) {
    return {signed_byte<BYTE>(words.low), signed_byte<BYTE>(words.high)};
  }
  static void store_int8(uint8_t* p, F a) {
    const int16x8_t words = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(a.low)), vmovn_s32(vcvtnq_s32_f32(a.high)));
    vst1_u8(p, vreinterpret_u8_s8(vmovn_s16(words)));
  }
  static void load_transposed(const uint8_t* const rows[L], int64_t byte, I words[4]) {
    uint32x4_t low[4], high[4];
    transpose(rows, byte, low);
    transpose(rows + 4, byte, high);
    for (int j = 0; j < 4; ++j) words[j] = {low[j], high[j]};
  }

  // Counts the midpoints below, one compare each.
  struct CountRanker {
    float midpoints[15];
    explicit CountRanker(const float* m) { std::memcpy(midpoints, m, sizeof midpoints); }
    I rank(F a) const {
      I r = {vdupq_n_u32(0), vdupq_n_u32(0)};
      for (float midpoint : midpoints) {
        r.low = vsubq_u32(r.low, vcgtq_f32(a.low, vdupq_n_f32(midpoint)));
        r.high = vsubq_u32(r.high, vcgtq_f32(a.high, vdupq_n_f32(midpoint)));
      }
      return r;
    }
  };
  // Buckets: round(15 a) + 16 cuts [-1, 1] into 31, each with at most one midpoint and a known rank below it, as in
  // decode_avx512.h. Adding 2^23 rounds, and leaves the bucket in the low byte.
  struct BucketRanker {
    uint8x16x2_t midpoint_bytes[4];  // of 2 where the bucket has none
    uint8x16x2_t ranks;
    bool is_exact;  // no bucket has two midpoints: rounding is monotone, so nothing else can go wrong
    explicit BucketRanker(const float* midpoints) {
      uint8_t below[32], bytes[4][32];
      uint8_t rank = 0;
      for (uint32_t b = 0; b < 32; ++b) {
        below[b] = rank;
        const bool found = rank < 15 && vgetq_lane_u32(bucket(vdupq_n_f32(midpoints[rank])), 0) == kFirstBucket + b;
        const uint32_t bits = bits_of(found ? midpoints[rank++] : 2.f);
        for (int i = 0; i < 4; ++i) bytes[i][b] = uint8_t(bits >> 8 * i);
      }
      is_exact = rank == 15;  // a second midpoint of a bucket, or one beyond [-1, 1], is never found
      ranks = {{vld1q_u8(below), vld1q_u8(below + 16)}};
      for (int i = 0; i < 4; ++i) midpoint_bytes[i] = {{vld1q_u8(bytes[i]), vld1q_u8(bytes[i] + 16)}};
    }
    static constexpr uint32_t kFirstBucket = 0x4b000000u;  // the bits of 2^23
    static uint32x4_t bucket(float32x4_t a) {
      return vreinterpretq_u32_f32(vfmaq_f32(vdupq_n_f32(0x1p23f + 16.f), a, vdupq_n_f32(15.f)));
    }
    // The bucket's number is byte 0 of a lane. Bytes 1 and 2 are 0, and no midpoint lies below bucket 0; byte 3 is past
    // the table's end, which gives 0. So the lookup's lanes are ranks.
    uint32x4_t rank_below(uint32x4_t bucket) const {
      return vreinterpretq_u32_u8(vqtbl2q_u8(ranks, vreinterpretq_u8_u32(bucket)));
    }
    I rank(F a) const {
      const I buckets = {bucket(a.low), bucket(a.high)};
      const uint8x16_t index = low_bytes(buckets);
      const uint8x16_t bytes[4] = {vqtbl2q_u8(midpoint_bytes[0], index), vqtbl2q_u8(midpoint_bytes[1], index),
                                   vqtbl2q_u8(midpoint_bytes[2], index), vqtbl2q_u8(midpoint_bytes[3], index)};
      const F midpoints = first_values(bytes);
      return {vsubq_u32(rank_below(buckets.low), vcgtq_f32(a.low, midpoints.low)),
              vsubq_u32(rank_below(buckets.high), vcgtq_f32(a.high, midpoints.high))};
    }
  };
  template <class Fn>
  static void with_ranker(const float* midpoints, Fn&& fn) {
    const BucketRanker buckets(midpoints);
    if (buckets.is_exact) return fn(buckets);
    fn(CountRanker(midpoints));
  }
  static I as_bits(F a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
  static void store_nibbles(uint8_t* p, I even, I odd) {
    const I bytes = {vsliq_n_u32(odd.low, even.low, 4), vsliq_n_u32(odd.high, even.high, 4)};  // byte 0 of each lane
    vst1_u8(p, vget_low_u8(low_bytes(bytes)));
  }
};

}  // namespace
}  // namespace nf4::cpu
