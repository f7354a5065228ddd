// What the products of unscaled codes share: code lookup in registers, and the block scales in vectors.
//
// A lookup is vpermw on 32 words of packed codes, shifted so that nibble i is the index. vpermw reads 5 index bits, so
// the table of 16 levels stands in the register twice and a nibble needs no mask:
//
//   a word of packed bytes, codes k .. k+3
//     bits       15-12   11-8     7-4   3-0
//     nibble     3       2        1     0
//     code of    k + 2   k + 3    k     k + 1       the even k of a byte is in its high nibble
//
// Levels are words: rounded to bf16 or to 13 bits without bias (rounded_code.cpp). A block's scale goes where one multiply
// serves many weights.
#pragma once

#include "decode_avx512.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

static inline Isa::I load_code_table(const RoundedCode<BFloat16>& code) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code.levels));
  return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

// The levels of nibble NIBBLE of each of 32 words; by the drawing, code k + (NIBBLE ^ 1).
template <int NIBBLE>
static inline Isa::I code_values(Isa::I table, Isa::I words) {
  return _mm512_permutexvar_epi16(NIBBLE == 0 ? words : _mm512_srli_epi16(words, 4 * NIBBLE), table);
}

// The order of 64 k when 16 words of codes are looked up nibble by nibble: lane j of vector v holds k = 4j + (v ^ 1).
struct NibbleByNibble {
  static constexpr int first_k(int vector) { return vector ^ 1; }
};

// A finished row of 64 sums in the order of NibbleByNibble, to dX[m, k .. k + k_count].
static inline void store_in_order(const float* row, const GemmArgs& args, int64_t m, int64_t k, int64_t k_count) {
  const auto vector = [&](int v) { return Isa::load(row + v * Isa::L); };
  float natural[4 * Isa::L];
  const Isa::I low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  float pairs[2][2 * Isa::L];  // k 4j and 4j+1, k 4j+2 and 4j+3
  Isa::store_pairs(pairs[0], vector(1), vector(0));
  Isa::store_pairs(pairs[1], vector(3), vector(2));
  for (int half = 0; half < 2; ++half) {
    const __m512d a = _mm512_castps_pd(Isa::load(pairs[0] + half * Isa::L));
    const __m512d b = _mm512_castps_pd(Isa::load(pairs[1] + half * Isa::L));
    float* out = natural + half * 2 * Isa::L;
    Isa::store(out, _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b)));
    Isa::store(out + Isa::L, _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b)));
  }
  auto* dx = static_cast<BFloat16*>(args.out) + m * args.weight.K + k;
  int64_t c = 0;
  for (; c + Isa::L <= k_count; c += Isa::L) Isa::store(dx + c, Isa::load(natural + c));
  for (; c < k_count; ++c) dx[c] = from_float<BFloat16>(natural[c]);
}

// fn(CodeRun<RUN>{}) with the weight's code_run.
template <int RUN>
struct CodeRun {
  static constexpr int value = RUN;
};
template <class Fn>
static inline void with_code_run(const Weight& w, Fn&& fn) {
  switch (code_run(w)) {
    case 16: return fn(CodeRun<16>{});
    case 32: return fn(CodeRun<32>{});
    default: return fn(CodeRun<64>{});
  }
}

// from[index(0)], ... from[index(15)]. Copies of integers stay off the vector ports, which the products need.
template <class T, class Index>
static inline Isa::F gather(const T* from, Index index) {
  alignas(64) T values[Isa::L];
#pragma GCC unroll 16
  for (int i = 0; i < Isa::L; ++i) std::memcpy(values + i, from + index(i), sizeof(T));
  return Isa::load(values);
}

// scale_absmax of blocks block(0), ... block(15), which ascend; past `count` the last one again.
template <class Block>
static inline Isa::F gather_superblocks(const Weight& w, int count, Block block) {
  if (w.scales != Scales::kDouble) return Isa::zero();
  const auto superblock = [&](int i) { return block(i < count ? i : count - 1) >> kSuperblockShift; };
  if (superblock(0) == superblock(Isa::L - 1)) return Isa::set1(w.scale_absmax[superblock(0)]);
  return gather(w.scale_absmax, superblock);
}

// The scales of 64 k of 16 rows of W, register by register of RUN k: block(i) is the block where they begin in row i.
template <int RUN, class Block>
static inline void gather_scales(const Weight& w, int count, Block block, Isa::F superblocks, Isa::F* scales) {
  constexpr int kParts = 64 / RUN;
  const auto gather_numbers = [&](auto number) {
    const auto* absmax = w.absmax_as<decltype(number)>();
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
      scales[p] = gather(absmax, [&](int i) { return block(i < count ? i : count - 1) + p; });
  };
  switch (w.scales) {
    case Scales::kFloat32: return gather_numbers(float{});
    case Scales::kBFloat16: return gather_numbers(BFloat16{});
    case Scales::kFloat16: return gather_numbers(Float16{});
    default: break;
  }
  const auto* absmax = w.absmax_as<uint8_t>();
  if constexpr (kParts == 1) {
    scales[0] = gather(w.scale_code, [&](int i) { return absmax[block(i < count ? i : count - 1)]; });
  } else {
    // The parts' codes lie together: one copy for each row, and then gathers (linear_dgrad of NVFP4, 2048x2048, M = 1:
    // 0.45 against 0.65 ms by single copies; 0.36 if a shift decoded E4M3, which from M = 4 on gains nothing; Xeon).
    alignas(64) uint32_t codes[Isa::L];
#pragma GCC unroll 16
    for (int i = 0; i < Isa::L; ++i) {
      codes[i] = 0;
      std::memcpy(codes + i, absmax + block(i < count ? i : count - 1), kParts);
    }
    const Isa::I words = _mm512_load_si512(codes);
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Isa::I index = _mm512_and_si512(_mm512_srli_epi32(words, 8 * p), _mm512_set1_epi32(255));
      scales[p] = _mm512_i32gather_ps(index, w.scale_code, 4);
    }
  }
  if (w.scales == Scales::kCodes) return;
  for (int p = 0; p < kParts; ++p)  // these blocks have one superblock
    scales[p] = Isa::add(Isa::mul(scales[p], superblocks), Isa::set1(*w.scale_offset));
}

// *low in lanes 0..7, *high in lanes 8..15.
static inline Isa::F broadcast_halves(const float* low, const float* high) {
  return _mm512_mask_broadcastss_ps(Isa::set1(*low), 0xff00, _mm_load_ss(high));
}

// The scales of blocks block, ... block + count - 1 in the first lanes; count <= BLOCKS, which are 4, 8 or 16.
template <int BLOCKS>
static inline Isa::F load_scales(const Weight& w, int64_t block, int count) {
  const auto there = __mmask16((1 << count) - 1);
  switch (w.scales) {
    case Scales::kFloat32: return _mm512_maskz_loadu_ps(there, w.absmax_as<float>() + block);
    case Scales::kBFloat16: {
      const Isa::I wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, w.absmax_as<uint16_t>() + block));
      return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    case Scales::kFloat16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, w.absmax_as<uint16_t>() + block));
    default: break;
  }
  const Isa::I codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.absmax_as<uint8_t>() + block));
  Isa::F values;
  if constexpr (BLOCKS == 4)
    values = _mm512_castps128_ps512(_mm_i32gather_ps(w.scale_code, _mm512_castsi512_si128(codes), 4));
  else if constexpr (BLOCKS == 8)
    values = _mm512_castps256_ps512(_mm256_i32gather_ps(w.scale_code, _mm512_castsi512_si256(codes), 4));
  else
    values = _mm512_i32gather_ps(codes, w.scale_code, 4);
  if (w.scales == Scales::kCodes) return values;
  const int64_t first = block >> kSuperblockShift, last = (block + count - 1) >> kSuperblockShift;
  const auto in_first = first == last ? 0xffff : (1 << ((last << kSuperblockShift) - block)) - 1;
  const Isa::F superblocks = _mm512_mask_broadcastss_ps(Isa::set1(w.scale_absmax[last]), __mmask16(in_first),
                                                        _mm_load_ss(w.scale_absmax + first));
  return Isa::add(Isa::mul(values, superblocks), Isa::set1(*w.scale_offset));
}

}  // namespace
}  // namespace nf4::cpu
