// The kernels' vocabulary for AVX-512 F, BW, DQ, VL: 16 fp32 lanes. See decode_scalar.h for what each function means.
//
// Lookup: the 16 levels fill one register, so a code's value is one vpermps, and only the low 4 index bits count.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../format.h"
#include "convert.h"

namespace nf4::cpu {
namespace {

struct Isa {
  static constexpr int L = 16;
  static constexpr int kTileM = 12;  // 12 x 2 accumulators and 2 weight vectors; x is broadcast from memory
  using F = __m512;
  using I = __m512i;
  using Table = F;

  static F set1(float a) { return _mm512_set1_ps(a); }
  static F set_halves(float low, float high) { return _mm512_mask_broadcastss_ps(set1(low), 0xff00, _mm_set_ss(high)); }
  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  template <class T>
  static void load_pairs(const T* p, F& even, F& odd) {
    const F low = load(p), high = load(p + L);
    const I index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(low, index, high);
    odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(index, _mm512_set1_epi32(1)), high);
  }
  static void load_pairs(const BFloat16* p, F& even, F& odd) {
    const I pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }

  // The two elements at p, in every 32-bit lane.
  static I broadcast_pair(const BFloat16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }

  // Not vcvtneps2bf16: it flushes subnormals. bf16 in the high half of each lane; a NaN becomes the quiet NaN.
  static I round_bf16(F a) {
    const I u = _mm512_castps_si512(a);
    const I lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static void store(BFloat16* p, F a) {
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static void store(Float16* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_pairs(float* p, F even, F odd) {
    const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
  }
  static void store_pairs(BFloat16* p, F even, F odd) {
    const I pairs = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(even), 16), round_bf16(odd));
    _mm512_storeu_si512(p, pairs);
  }
  static void store_pairs(Float16* p, F even, F odd) {
    const I low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(even, _MM_FROUND_TO_NEAREST_INT));
    const I high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }

  static float max_abs(const float* p, int count) {
    I bits = _mm512_setzero_si512();
    for (int i = 0; i < count; i += L)
      bits = _mm512_max_epi32(bits, _mm512_and_si512(_mm512_loadu_si512(p + i), _mm512_set1_epi32(0x7fffffff)));
    return float_of(uint32_t(_mm512_reduce_max_epi32(bits)));
  }
  // By hand for 16 bits: what gcc 12 makes of the portable loop costs quantize 14 % (one core of a Zen 4 EPYC).
  template <class T>
  static float max_abs(const T* p, int count) {
    I bits = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 2 * L)
      bits = _mm512_max_epu16(bits, _mm512_and_si512(_mm512_loadu_si512(p + i), _mm512_set1_epi16(0x7fff)));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // x86 has the minimum of 8 words as one instruction, so take that of the complements.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    return to_float(T{uint16_t(~_mm_cvtsi128_si32(least))});
  }

  static Table load_table(const float* p) { return _mm512_loadu_ps(p); }
  static F lookup(Table t, I index) { return _mm512_permutexvar_ps(index, t); }
  template <int BYTE>
  static void lookup_nibbles(Table t, I words, F& high, F& low) {
    high = lookup(t, _mm512_srli_epi32(words, 8 * BYTE + 4));
    low = lookup(t, _mm512_srli_epi32(words, 8 * BYTE));
  }
  static void decode_pairs(const uint8_t* p, Table t, F& even, F& odd) {
    const I bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    even = lookup(t, _mm512_srli_epi32(bytes, 4));
    odd = lookup(t, bytes);
  }
  static F load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static I load_words16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int BYTE>
  static F signed_byte(I words) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * BYTE), 24));
  }
  static void store_int8(uint8_t* p, F a) {
    const I rounded = _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(rounded));
  }
  static void load_transposed(const uint8_t* const rows[L], int64_t byte, I words[4]) {
    I z[4];  // 128-bit quarter q of z[i] is row 4q + i; a 4x4 transpose inside the quarters puts the rows in order
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int q) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 * q + i] + byte));
      };
      z[i] = _mm512_castsi128_si512(quarter(0));
      z[i] = _mm512_inserti32x4(z[i], quarter(1), 1);
      z[i] = _mm512_inserti32x4(z[i], quarter(2), 2);
      z[i] = _mm512_inserti32x4(z[i], quarter(3), 3);
    }
    const I a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpacklo_epi32(z[2], z[3]);
    const I c = _mm512_unpackhi_epi32(z[0], z[1]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    words[0] = _mm512_unpacklo_epi64(a, b);
    words[1] = _mm512_unpackhi_epi64(a, b);
    words[2] = _mm512_unpacklo_epi64(c, d);
    words[3] = _mm512_unpackhi_epi64(c, d);
  }

  // Binary search, one vpermps a step: the tables are the midpoints rotated, so that the rank itself is the index.
  struct SearchRanker {
    F middle;
    Table plus3, plus1, plus0;
    explicit SearchRanker(const float* midpoints) : middle(set1(midpoints[7])) {
      float rotated[16];
      plus3 = load_table(rotate_midpoints(midpoints, 3, rotated));
      plus1 = load_table(rotate_midpoints(midpoints, 1, rotated));
      plus0 = load_table(rotate_midpoints(midpoints, 0, rotated));
    }
    static I step(F a, Table t, I rank, int bit) {
      const __mmask16 above = _mm512_cmp_ps_mask(a, lookup(t, rank), _CMP_GT_OQ);
      return _mm512_mask_or_epi32(rank, above, rank, _mm512_set1_epi32(bit));
    }
    I rank(F a) const {
      I r = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a, middle, _CMP_GT_OQ), 8);
      r = step(a, plus3, r, 4);
      r = step(a, plus1, r, 2);
      return step(a, plus0, r, 1);
    }
  };
  // Buckets: round(15 a) + 16 cuts [-1, 1] into 31, each with at most one midpoint and a known rank below it. Adding
  // 2^23 rounds, and leaves the bucket in the low bits, the only ones that a two-register lookup reads.
  struct BucketRanker {
    F midpoint_low, midpoint_high;  // 2 where the bucket has none
    I rank_low, rank_high;
    bool is_exact;  // no bucket has two midpoints: rounding is monotone, so nothing else can go wrong
    explicit BucketRanker(const float* midpoints) {
      uint32_t buckets[L], ranks[32];
      float in_bucket[32];
      _mm512_storeu_si512(buckets, bucket(_mm512_maskz_loadu_ps(0x7fff, midpoints)));
      uint32_t rank = 0;
      for (uint32_t b = 0; b < 32; ++b) {
        ranks[b] = rank;
        const bool found = rank < 15 && buckets[rank] == bits_of(0x1p23f) + b;
        in_bucket[b] = found ? midpoints[rank++] : 2.f;
      }
      is_exact = rank == 15;  // a second midpoint of a bucket, or one beyond [-1, 1], is never found
      midpoint_low = load(in_bucket);
      midpoint_high = load(in_bucket + L);
      rank_low = _mm512_loadu_si512(ranks);
      rank_high = _mm512_loadu_si512(ranks + L);
    }
    static I bucket(F a) { return _mm512_castps_si512(fma(a, set1(15.f), set1(0x1p23f + 16.f))); }
    I rank(F a) const {
      const I b = bucket(a);
      const F midpoint = _mm512_permutex2var_ps(midpoint_low, b, midpoint_high);
      const I r = _mm512_permutex2var_epi32(rank_low, b, rank_high);
      return _mm512_mask_add_epi32(r, _mm512_cmp_ps_mask(a, midpoint, _CMP_GT_OQ), r, _mm512_set1_epi32(1));
    }
  };
  template <class Fn>
  static void with_ranker(const float* midpoints, Fn&& fn) {
    const BucketRanker buckets(midpoints);
    if (buckets.is_exact) return fn(buckets);
    fn(SearchRanker(midpoints));
  }
  static I as_bits(F a) { return _mm512_castps_si512(a); }
  static void store_nibbles(uint8_t* p, I even, I odd) {
    const I bytes = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bytes));
  }
};

}  // namespace
}  // namespace nf4::cpu
