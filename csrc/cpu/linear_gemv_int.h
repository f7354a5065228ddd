// linear in bf16 and fp16 with AVX2, M <= 16, in whole numbers: y[m, n]
//     = sum_b scale[n, b] * step[m, b] * (sum_{k in b} x16[m, k] * level16[n, k]) + bias[n]
//
// Read first   rounded_code.h.
// Work split   Columns [n_begin, n_end) of y, two rows of W at a time. The caller splits them over threads.
// Inner loop   32 bytes are 64 codes of a row of W: 4 pshufb give the two bytes of 32 levels each time, 4 unpacks put
//              them together, and vpmaddwd multiplies 16 of them with x and adds pairs. A block's sum is a whole number,
//              which becomes fp32 once.
// The trick    A level is a whole number of 13 bits, x one of 15 bits and its sign, by a step for each 64 k of a row of
//              x: 8 products fit a lane of 32 bits, 8 * 32767 * 8191 < 2^31. Two bytes are looked up for a level where
//              fp32 has four, and an instruction multiplies 16 weights instead of 8.
// Exactness    x is exact where it is above 2^-8 (bf16) or 2^-5 (fp16) of the largest of its 64, else off by at most
//              2^-16 of that; the levels are off by 2^-14 of the largest, without bias, where dense products round each
//              weight by 2^-9 or 2^-12 of it.
// Rejected     fp32 products (linear_gemv.h, gemm.h), AVX2, 256x4096 in a cache, one core of a Zen 4 EPYC: M = 1: 94
//              against 43 us, M = 4: 166 and 97, M = 8: 287 and 193, M = 16: 455 and 386; from M = 17 on they are faster.
//              fp32 products of levels that four pshufb and eight unpacks put together: 96 us at M = 1.
// Instead      Where the machine has AVX-512, linear_gemv_codes_int.h looks up both bytes of a level at once.
// Bytes        Reads 0.52 B a weight (double-quantized).
// Needs        a code_run of 64. A row of x with NaN or inf gives a row of NaN.
//
//   panel: x16 [K / 64][M][4][16], then step [K / 64][M]; the 64 k of a group in the order of the lookups, of 32 bytes
//   of codes whose high nibbles are even k
//
//     | k 0 2 .. 14, 32 34 .. 46 | k 16 18 .. 30, 48 .. 62 | k 1 3 .. 15, 33 .. 47 | k 17 .. 31, 49 .. 63 |
#pragma once

#include "decode_span.h"
#include "lora_term.h"
#include "whole_numbers.h"

namespace nf4::cpu {
namespace {

constexpr int kGemvIntTileM = 4;
constexpr int kGemvIntTileN = 2;
constexpr int64_t kGemvIntRunK = 512 * kWholeGroupK;  // k whose sums are added up in one accumulator

static inline int64_t gemv_int_row_bytes(int64_t K) { return K * 2 + K / kWholeGroupK * 4; }

// GemvPackFn.
void gemv_int_pack(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel) {
  auto* out = static_cast<Isa::I*>(panel);
  auto* steps = reinterpret_cast<float*>(static_cast<char*>(panel) + M * K * 2);
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t k = 0; k < K; k += kWholeGroupK)
      for (int64_t m = 0; m < M; ++m, out += 4) {
        const auto* group = in + m * K + k;
        const WholeStep step = step_of(group);
        *steps++ = step.step;
        const Isa::F factor = Isa::set1(step.factor);
        Isa::I whole[2][4];  // even and odd k, 8 of each 16
        for (int q = 0; q < 4; ++q) {
          Isa::F even, odd;
          Isa::load_pairs(group + 2 * Isa::L * q, even, odd);
          whole[0][q] = _mm256_cvtps_epi32(Isa::mul(even, factor));
          whole[1][q] = _mm256_cvtps_epi32(Isa::mul(odd, factor));
        }
        for (int odd = 0; odd < 2; ++odd)
          for (int q = 0; q < 2; ++q) {
            const Isa::I packed = _mm256_packs_epi32(whole[odd][q], whole[odd][q + 2]);
            _mm256_storeu_si256(out + 2 * odd + q, _mm256_permute4x64_epi64(packed, 0xd8));
          }
      }
  });
}

struct IntLevels {
  Isa::I low, high;  // bytes of each level, in both halves
};

static inline IntLevels load_int_levels(const RoundedCode<Int13>& code) {
  uint8_t low[16], high[16];
  for (int i = 0; i < kLevels; ++i) {
    const int value = whole_number(code.levels[i]);
    low[i] = uint8_t(value & 255);
    high[i] = uint8_t(value >> 8 & 255);
  }
  const auto both = [](const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  };
  return {both(low), both(high)};
}

// sums[r][m] += x[m, :] . W[n + r, :] for rows m .. m + TILE_M of x, but for the codebook's scale.
template <int TILE_M, int TILE_N>
void dot_int(const GemmArgs& args, const IntLevels& levels, int64_t n, int64_t m, float (*sums)[kGemvIntMaxM]) {
  const Weight& w = args.weight;
  const auto* x = static_cast<const Isa::I*>(args.panel) + m * 4;
  const float* steps = reinterpret_cast<const float*>(static_cast<const char*>(args.panel) + args.M * w.K * 2) + m;
  const Isa::I nibble = _mm256_set1_epi8(15);
  for (int64_t run = 0; run < w.K; run += kGemvIntRunK) {
    const int64_t end = w.K - run < kGemvIntRunK ? w.K : run + kGemvIntRunK;
    float scales[TILE_N][kGemvIntRunK / kWholeGroupK];
    Isa::F total[TILE_N][TILE_M];
#pragma GCC unroll 4
    for (int r = 0; r < TILE_N; ++r) {
      if (w.block_shift == 6) {
        scales_of_blocks(w, ((n + r) * w.K + run) >> w.block_shift, (end - run) >> w.block_shift, scales[r]);
      } else {
        for (int64_t k = run; k < end; k += kWholeGroupK)
          scales[r][(k - run) / kWholeGroupK] = block_scale(w, ((n + r) * w.K + k) >> w.block_shift);
      }
#pragma GCC unroll 4
      for (int i = 0; i < TILE_M; ++i) total[r][i] = Isa::zero();
    }
    for (int64_t k = run; k < end; k += kWholeGroupK, x += args.M * 4, steps += args.M)
#pragma GCC unroll 4
      for (int r = 0; r < TILE_N; ++r) {
        const uint8_t* bytes = w.packed + ((n + r) * w.K + k) / 2;
        __builtin_prefetch(bytes + TILE_N * w.K / 2);
        const Isa::I codes = _mm256_loadu_si256(reinterpret_cast<const Isa::I*>(bytes));
        const Isa::I even = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble),
                     odd = _mm256_and_si256(codes, nibble);
        const Isa::I even_low = _mm256_shuffle_epi8(levels.low, even),
                     even_high = _mm256_shuffle_epi8(levels.high, even);
        const Isa::I odd_low = _mm256_shuffle_epi8(levels.low, odd), odd_high = _mm256_shuffle_epi8(levels.high, odd);
        const Isa::I values[4] = {_mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high),
                                  _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high)};
        const Isa::F scale = Isa::set1(scales[r][(k - run) / kWholeGroupK]);
#pragma GCC unroll 4
        for (int i = 0; i < TILE_M; ++i) {
          const Isa::I* xi = x + i * 4;
          const Isa::I first = _mm256_add_epi32(_mm256_madd_epi16(values[0], _mm256_loadu_si256(xi)),
                                                _mm256_madd_epi16(values[1], _mm256_loadu_si256(xi + 1)));
          const Isa::I second = _mm256_add_epi32(_mm256_madd_epi16(values[2], _mm256_loadu_si256(xi + 2)),
                                                 _mm256_madd_epi16(values[3], _mm256_loadu_si256(xi + 3)));
          const Isa::F sum = _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
          total[r][i] = Isa::fma(Isa::mul(sum, Isa::set1(steps[i])), scale, total[r][i]);
        }
      }
    for (int r = 0; r < TILE_N; ++r)
      for (int i = 0; i < TILE_M; ++i)
        sums[r][m + i] = (run == 0 ? 0.f : sums[r][m + i]) + Isa::reduce_add(total[r][i]);
  }
}

template <int TILE_N>
void dot_int_rows(const GemmArgs& args, const IntLevels& levels, int64_t n, float (*sums)[kGemvIntMaxM]) {
  const int64_t tiles = m_tiles(args.M, kGemvIntTileM);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = first_m(tile, tiles, args.M);
    switch (first_m(tile + 1, tiles, args.M) - m) {
      case 1: dot_int</*TILE_M=*/1, TILE_N>(args, levels, n, m, sums); break;
      case 2: dot_int</*TILE_M=*/2, TILE_N>(args, levels, n, m, sums); break;
      case 3: dot_int</*TILE_M=*/3, TILE_N>(args, levels, n, m, sums); break;
      default: dot_int</*TILE_M=*/4, TILE_N>(args, levels, n, m, sums);
    }
  }
}

// GemvFn.
void linear_gemv_int(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const IntLevels levels = load_int_levels(args.int_code);
  for (int64_t n = n_begin; n < n_end;) {
    const int n_count = n + kGemvIntTileN <= n_end ? kGemvIntTileN : 1;
    float sums[kGemvIntTileN][kGemvIntMaxM];
    if (n_count == 1)
      dot_int_rows</*TILE_N=*/1>(args, levels, n, sums);
    else
      dot_int_rows<kGemvIntTileN>(args, levels, n, sums);
    for (int r = 0; r < n_count; ++r, ++n) {
      for (int64_t m = 0; m < args.M; ++m) sums[r][m] *= args.int_code.scale;
      with_type(args.dtype, [&](auto t) { store_column<decltype(t)>(args, n, sums[r]); });
    }
  }
}

}  // namespace
}  // namespace nf4::cpu
