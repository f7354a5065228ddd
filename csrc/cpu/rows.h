// Rows of x, or of a LoRA factor, as a kernel's elements: converted, and transposed by 32-bit words.
#pragma once

#include "convert.h"

namespace nf4::cpu {
namespace {

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// to[0, count) = from, and zeros up to `padded`.
template <class T, class Element>
void convert_row(const T* from, int64_t count, int64_t padded, Element* to) {
  int64_t d = 0;
  for (; d + Isa::L <= count; d += Isa::L) Isa::store(to + d, Isa::load(from + d));
  for (; d < count; ++d) to[d] = from_float<Element>(to_float(from[d]));
  for (; d < padded; ++d) to[d] = from_float<Element>(0.f);
}
template <class T>
void convert_row(const T* from, int64_t count, int64_t padded, T* to) {
  std::memcpy(static_cast<void*>(to), from, size_t(count) * sizeof(T));
  std::memset(static_cast<void*>(to + count), 0, size_t(padded - count) * sizeof(T));
}

// Words [0, count) of L rows, a multiple of 4, into out[word][stride], in bytes: a word is one fp32 or two bf16. All L
// lanes are written, those past `stride` before the next word is.
static inline void transpose_words(const uint8_t* const rows[Isa::L], int64_t count, int64_t stride, void* out) {
  auto* to = static_cast<char*>(out);
  for (int64_t word = 0; word < count; word += 4) {
    Isa::I words[4];
    Isa::load_transposed(rows, word * 4, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, to += stride) std::memcpy(to, &words[i], sizeof words[i]);  // in registers if unrolled
  }
}

}  // namespace
}  // namespace nf4::cpu
