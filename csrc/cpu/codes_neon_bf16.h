// What the bf16 products of NEON share: registers of bf16, and the scales of many blocks.
#pragma once

#include "decode_neon.h"

#include "code_table_neon.h"
#include "kernels.h"

namespace nf4::cpu {
namespace {

static inline bfloat16x8_t load_bf16(const BFloat16* p) { return vreinterpretq_bf16_u16(Isa::load_bits(p)); }

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
