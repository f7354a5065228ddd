// What the 16-bit products of NEON share: registers and broadcast pairs of bf16, a panel of even and odd k, and the
// scales of many blocks.
#pragma once

#include "decode_neon.h"

#include "code_table_neon.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

static inline bfloat16x8_t load_bf16(const BFloat16* p) { return vreinterpretq_bf16_u16(Isa::load_bits(p)); }

// acc plus, in each lane, a pair of bf16 times the pair at p.
static inline Isa::F add_pairs(const BFloat16* p, Isa::F pairs, Isa::F acc) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  const bfloat16x8_t all = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  return {vbfdotq_f32(acc.low, vreinterpretq_bf16_f32(pairs.low), all),
          vbfdotq_f32(acc.high, vreinterpretq_bf16_f32(pairs.high), all)};
}

// x [M, K] of a 16-bit type, K a multiple of 32, as a panel [K / 32][M][32], the even k before the odd ones.
static inline void pack_even_odd(const void* x, int64_t M, int64_t K, void* panel) {
  constexpr int kGroup = 32;
  const auto* in = static_cast<const uint16_t*>(x);
  auto* out = static_cast<uint16_t*>(panel);
  for (int64_t k = 0; k < K; k += kGroup)
    for (int64_t m = 0; m < M; ++m, out += kGroup)
      for (int half = 0; half < 2; ++half) {
        const uint16x8_t a = Isa::load_bits(in + m * K + k + 16 * half);
        const uint16x8_t b = Isa::load_bits(in + m * K + k + 16 * half + 8);
        Isa::store_bits(out + 8 * half, vuzp1q_u16(a, b));
        Isa::store_bits(out + 8 * half + 16, vuzp2q_u16(a, b));
      }
}

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
