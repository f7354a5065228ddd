// Decodes any run of consecutive weights: the one routine that knows odd starts, block boundaries and tails.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

template <class T>
void decode_span(const Weight& w, int64_t begin, int64_t count, T* out) {
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
