// The kernels' vocabulary for AVX2 + FMA + F16C: 8 fp32 lanes. See decode_scalar.h for what each function means.
//
// Lookup: the 16 levels as two 8-lane registers, permutevar8x32 on both and a blend on bit 3 (no gather: 8 loads).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../format.h"
#include "convert.h"

namespace nf4::cpu {
namespace {

struct Isa {
  static constexpr int L = 8;
  static constexpr int kTileM = 6;  // 6 x 2 accumulators, 2 weight vectors and 1 broadcast fill 15 of 16 registers
  using F = __m256;
  using I = __m256i;
  struct Table {
    F low, high;
  };

  static F set1(float a) { return _mm256_set1_ps(a); }
  static F set_halves(float low, float high) { return _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)); }
  static F zero() { return _mm256_setzero_ps(); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <class T>
  static void load_pairs(const T* p, F& even, F& odd) {
    const F a = load(p), b = load(p + L);
    const F low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    even = _mm256_shuffle_ps(low, high, 0x88);
    odd = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void load_pairs(const BFloat16* p, F& even, F& odd) {
    const I pairs = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  }

  // bf16 in the high half of each lane, rounded to nearest even; a NaN becomes the quiet NaN.
  static I round_bf16(F a) {
    const I u = _mm256_castps_si256(a);
    const I lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
    const F nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static void store(BFloat16* p, F a) {
    const I high = _mm256_srli_epi32(round_bf16(a), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_pairs(float* p, F even, F odd) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  static void store_pairs(BFloat16* p, F even, F odd) {
    const I pairs = _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(even), 16), round_bf16(odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<I*>(p), pairs);
  }
  static void store_pairs(Float16* p, F even, F odd) {
    const I low = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(even, _MM_FROUND_TO_NEAREST_INT));
    const I high = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float reduce_add(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  template <class T>
  static float max_abs(const T* p, int count) {
    return max_magnitude(p, count);
  }

  static Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F lookup(const Table& t, I index) {
    const F bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), bit3);
  }
  template <int BYTE>
  static void lookup_nibbles(const Table& t, I words, F& high, F& low) {
    high = lookup(t, _mm256_srli_epi32(words, 8 * BYTE + 4));
    low = lookup(t, _mm256_srli_epi32(words, 8 * BYTE));
  }
  static void decode_pairs(const uint8_t* p, const Table& t, F& even, F& odd) {
    const I bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    even = lookup(t, _mm256_srli_epi32(bytes, 4));
    odd = lookup(t, bytes);
  }
  static F load_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static I load_words16(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int BYTE>
  static F signed_byte(I words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * BYTE), 24));
  }
  static void store_int8(uint8_t* p, F a) {
    const I rounded = _mm256_cvtps_epi32(_mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static void load_transposed(const uint8_t* const rows[L], int64_t byte, I words[4]) {
    F z[4];  // 128-bit half h of z[i] is row 4h + i; a 4x4 transpose inside the halves puts the rows in order
    for (int i = 0; i < 4; ++i) {
      const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(rows[i] + byte));
      const __m128 high = _mm_loadu_ps(reinterpret_cast<const float*>(rows[4 + i] + byte));
      z[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1])),
                  b = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
    const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1])),
                  d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
    words[0] = _mm256_castpd_si256(_mm256_unpacklo_pd(a, b));
    words[1] = _mm256_castpd_si256(_mm256_unpackhi_pd(a, b));
    words[2] = _mm256_castpd_si256(_mm256_unpacklo_pd(c, d));
    words[3] = _mm256_castpd_si256(_mm256_unpackhi_pd(c, d));
  }

  // Binary search; after the first step bit 3 of the rank is known, so each later lookup blends on that one mask.
  struct Ranker {
    F middle;
    Table plus3, plus1, plus0;
    explicit Ranker(const float* midpoints) : middle(set1(midpoints[7])) {
      float rotated[16];
      plus3 = load_table(rotate_midpoints(midpoints, 3, rotated));
      plus1 = load_table(rotate_midpoints(midpoints, 1, rotated));
      plus0 = load_table(rotate_midpoints(midpoints, 0, rotated));
    }
    static I step(F a, const Table& t, F above_middle, I rank, int bit) {
      const F m =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, rank), _mm256_permutevar8x32_ps(t.high, rank), above_middle);
      const I above = _mm256_castps_si256(_mm256_cmp_ps(a, m, _CMP_GT_OQ));
      return _mm256_or_si256(rank, _mm256_and_si256(above, _mm256_set1_epi32(bit)));
    }
    I rank(F a) const {
      const F above = _mm256_cmp_ps(a, middle, _CMP_GT_OQ);
      I r = _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(8));
      r = step(a, plus3, above, r, 4);
      r = step(a, plus1, above, r, 2);
      return step(a, plus0, above, r, 1);
    }
  };
  template <class Fn>
  static void with_ranker(const float* midpoints, Fn&& fn) {
    fn(Ranker(midpoints));
  }
  static I as_bits(F a) { return _mm256_castps_si256(a); }
  static void store_nibbles(uint8_t* p, I even, I odd) {
    const I bytes = _mm256_or_si256(_mm256_slli_epi32(even, 4), odd);  // byte 0 of each u32
    const I gathered = _mm256_shuffle_epi8(bytes, _mm256_set1_epi32(0x0c080400));
    const uint32_t halves[2] = {uint32_t(_mm256_extract_epi32(gathered, 0)),
                                uint32_t(_mm256_extract_epi32(gathered, 4))};
    std::memcpy(p, halves, 8);
  }
};

}  // namespace
}  // namespace nf4::cpu
