// Decodes any run of consecutive weights: the one routine that knows odd starts, block boundaries and tails.
//
//   2L weights of two blocks of 16, L = 16      decode_pairs: even, odd        scales_of_pairs
//     | k 0 .. 15 | k 16 .. 31 |                 lane i: k 2i, k 2i + 1         lanes 0-7: of k 0, 8-15: of k 16
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

// The scales of 2L weights from element `at` on, a multiple of 2L, in the order of decode_pairs.
static inline Isa::F scales_of_pairs(const Weight& w, int64_t at) {
  static_assert(Isa::L <= kMinBlockSize, "2L weights have at most two scales");
  const int64_t block = at >> w.block_shift;
  if (1 << w.block_shift < 2 * Isa::L) return Isa::set_halves(block_scale(w, block), block_scale(w, block + 1));
  return Isa::set1(block_scale(w, block));
}

// The scales of blocks [first, first + count): their kind is asked for once, not in the loop.
static inline void scales_of_blocks(const Weight& w, int64_t first, int64_t count, float* __restrict scales) {
  const auto copy_numbers = [&](auto number) {
    const auto* absmax = w.absmax_as<decltype(number)>() + first;
    for (int64_t i = 0; i < count; ++i) scales[i] = to_float(absmax[i]);
  };
  switch (w.scales) {
    case Scales::kFloat32: return copy_numbers(float{});
    case Scales::kBFloat16: return copy_numbers(BFloat16{});
    case Scales::kFloat16: return copy_numbers(Float16{});
    default: break;
  }
  const auto* absmax = w.absmax_as<uint8_t>() + first;
  const float* code = w.scale_code;
  if (w.scales == Scales::kCodes) {
    for (int64_t i = 0; i < count; ++i) scales[i] = code[absmax[i]];
    return;
  }
  const float* superblocks = w.scale_absmax;
  const float offset = *w.scale_offset;
  for (int64_t i = 0; i < count; ++i) {
    const float product = code[absmax[i]] * superblocks[(first + i) >> kSuperblockShift];
    scales[i] = product + offset;
  }
}

// decode_span of blocks of at most 2L weights: vector by vector, where a loop over each block would have one turn.
template <class T>
void decode_short_blocks(const Weight& w, int64_t begin, int64_t count, T* out) {
  const Isa::Table table = Isa::load_table(w.code);
  const auto decode_one = [&](int64_t i) {
    out[i] = from_float<T>(w.code[nibble(w.packed, begin + i)] * block_scale(w, (begin + i) >> w.block_shift));
  };
  int64_t i = 0;
  for (; i < count && (begin + i) % (2 * Isa::L) != 0; ++i) decode_one(i);
  for (; i + 2 * Isa::L <= count; i += 2 * Isa::L) {
    Isa::F even, odd;
    Isa::decode_pairs(w.packed + (begin + i) / 2, table, even, odd);
    const Isa::F scales = scales_of_pairs(w, begin + i);
    Isa::store_pairs(out + i, Isa::mul(even, scales), Isa::mul(odd, scales));
  }
  for (; i < count; ++i) decode_one(i);
}

template <class T>
void decode_span(const Weight& w, int64_t begin, int64_t count, T* out) {
  if (1 << w.block_shift <= 2 * Isa::L) return decode_short_blocks(w, begin, count, out);
  const Isa::Table table = Isa::load_table(w.code);
  while (count > 0) {
    const int64_t block = begin >> w.block_shift, left = ((block + 1) << w.block_shift) - begin;
    const int64_t run = count < left ? count : left;
    const float scale = block_scale(w, block);
    const Isa::F scales = Isa::set1(scale);
    int64_t i = 0;
    if (begin % 2 == 1) {
      out[0] = from_float<T>(w.code[nibble(w.packed, begin)] * scale);
      i = 1;
    }
    for (; i + 2 * Isa::L <= run; i += 2 * Isa::L) {
      Isa::F even, odd;
      Isa::decode_pairs(w.packed + (begin + i) / 2, table, even, odd);
      Isa::store_pairs(out + i, Isa::mul(even, scales), Isa::mul(odd, scales));
    }
    for (; i < run; ++i) out[i] = from_float<T>(w.code[nibble(w.packed, begin + i)] * scale);
    begin += run;
    out += run;
    count -= run;
  }
}

}  // namespace
}  // namespace nf4::cpu
