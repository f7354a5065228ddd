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
// Levels are rounded to bf16 without bias (rounded_code.cpp); a block's scale goes where one multiply serves many
// weights.
#pragma once

#include "decode_avx512.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int kScaled = 64;  // consecutive k that certainly share a scale

static inline Isa::I load_code_table(const RoundedCode<BFloat16>& code) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code.levels));
  return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

// The bf16 levels of nibble NIBBLE of each of 32 words; by the drawing, code k + (NIBBLE ^ 1).
template <int NIBBLE>
static inline __m512bh code_values(Isa::I table, Isa::I words) {
  return (__m512bh)_mm512_permutexvar_epi16(NIBBLE == 0 ? words : _mm512_srli_epi16(words, 4 * NIBBLE), table);
}

// scale_absmax of blocks block(0), ... block(15), which ascend; past `count` the last one again.
template <class Block>
static inline Isa::F gather_superblocks(const Weight& w, int count, Block block) {
  if (w.scales != Scales::kDouble) return Isa::zero();
  const auto superblock = [&](int i) { return block(i < count ? i : count - 1) >> kSuperblockShift; };
  if (superblock(0) == superblock(Isa::L - 1)) return Isa::set1(w.scale_absmax[superblock(0)]);
  alignas(64) float values[Isa::L];
#pragma GCC unroll 16
  for (int i = 0; i < Isa::L; ++i) std::memcpy(values + i, w.scale_absmax + superblock(i), sizeof(float));
  return Isa::load(values);
}

// The scales of those blocks. It takes half the time of 16 calls of block_scale: the lookups stay off the vector ports.
template <class Block>
static inline Isa::F gather_scales(const Weight& w, int count, Block block, Isa::F superblocks) {
  alignas(64) float values[Isa::L];
  const auto block_of = [&](int i) { return block(i < count ? i : count - 1); };
  if (w.scales != Scales::kDouble) {
    for (int i = 0; i < Isa::L; ++i) values[i] = block_scale(w, block_of(i));
    return Isa::load(values);
  }
  const auto* absmax = w.absmax_as<uint8_t>();
#pragma GCC unroll 16
  for (int i = 0; i < Isa::L; ++i) std::memcpy(values + i, w.scale_code + absmax[block_of(i)], sizeof(float));
  return Isa::add(Isa::mul(Isa::load(values), superblocks), Isa::set1(*w.scale_offset));
}

// *low in lanes 0..7, *high in lanes 8..15.
static inline Isa::F broadcast_halves(const float* low, const float* high) {
  return _mm512_mask_broadcastss_ps(Isa::set1(*low), 0xff00, _mm_load_ss(high));
}

// The scale of block `low` in lanes 0..7, of `high` in lanes 8..15.
static inline Isa::F half_scales(const Weight& w, int64_t low, int64_t high) {
  if (w.scales != Scales::kDouble) {
    const float scales[2] = {block_scale(w, low), block_scale(w, high)};
    return broadcast_halves(scales, scales + 1);
  }
  const auto* absmax = w.absmax_as<uint8_t>();
  const Isa::F values = broadcast_halves(w.scale_code + absmax[low], w.scale_code + absmax[high]);
  const Isa::F groups =
      broadcast_halves(w.scale_absmax + (low >> kSuperblockShift), w.scale_absmax + (high >> kSuperblockShift));
  return Isa::add(Isa::mul(values, groups), Isa::set1(*w.scale_offset));
}

}  // namespace
}  // namespace nf4::cpu
