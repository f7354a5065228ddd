// Decodes any run of int8 weights: W[i] = byte i as a signed integer * scale(block i), rounded once to fp32, then once to
// the output dtype.
//
// Inner loop   L bytes are one load that widens, one conversion and one product. Rejected: a lookup as of 4 bits, since
//              256 levels fill 16 registers of AVX-512 and a gather is L loads.
// Needs        Nothing: a byte is a weight, so that a run may begin and end anywhere.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

template <class T>
void decode_int8(const Weight& w, int64_t begin, int64_t count, T* out) {
  const uint8_t* bytes = w.packed + begin;
  while (count > 0) {
    const int64_t block = begin >> w.block_shift, left = ((block + 1) << w.block_shift) - begin;
    const int64_t run = count < left ? count : left;
    const float scale = block_scale(w, block);
    const Isa::F scales = Isa::set1(scale);
    int64_t i = 0;
    for (; i + Isa::L <= run; i += Isa::L) Isa::store(out + i, Isa::mul(Isa::load_int8(bytes + i), scales));
    for (; i < run; ++i) out[i] = from_float<T>(float(int8_t(bytes[i])) * scale);
    begin += run;
    bytes += run;
    out += run;
    count -= run;
  }
}

}  // namespace
}  // namespace nf4::cpu
