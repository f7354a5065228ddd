// linear_dgrad of int8 weights: dX[m, k] = sum_n dY[m, n] * W[n, k]
//
// Read first   linear_dgrad.h, of whose products this is the decoder.
// Inner loop   2L bytes of a row of W are L words of 16 bits: their low bytes are the even k, their high ones the odd.
// Needs        K % 2L == 0 for the vector path; other K decode whole spans first.
#pragma once

#include "decode_int8.h"
#include "linear_dgrad.h"

namespace nf4::cpu {
namespace {

constexpr int kInt8Group = 64 / kTileK;  // K tiles of a cache line of W
static_assert(kInt8Group >= 1, "a tile is at most a cache line");

// As decode_even_odd.
static inline void decode_even_odd_int8(const Weight& w, int64_t n, int64_t k, int64_t k_count, Isa::F& even,
                                        Isa::F& odd) {
  const int64_t flat = n * w.K + k;
  if (w.K % (2 * Isa::L) == 0) {
    const Isa::F scale = scales_of_pairs(w, flat);
    const Isa::I words = Isa::load_words16(w.packed + flat);
    even = Isa::mul(Isa::template signed_byte<0>(words), scale);
    odd = Isa::mul(Isa::template signed_byte<1>(words), scale);
    return;
  }
  float decoded[kTileK] = {}, halves[kTileK];
  decode_int8(w, flat, k_count, decoded);
  for (int i = 0; i < kTileK; ++i) halves[i / 2 + i % 2 * Isa::L] = decoded[i];
  even = Isa::load(halves);
  odd = Isa::load(halves + Isa::L);
}

static inline void prefetch_row_int8(const Weight& w, int64_t n, int64_t k) {
  constexpr int64_t kAhead = 24;  // as prefetch_row
  __builtin_prefetch(w.packed + (n + kAhead) * w.K + k);
}

struct DgradInt8Fp32 : Fp32Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kInt8Group;
  static void decode_slice(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, float* slice) {
    for (int64_t i = 0; i < n_count; ++i) {
      Isa::F even, odd;
      prefetch_row_int8(w, n + i, k);
      decode_even_odd_int8(w, n + i, k, k_count, even, odd);
      Isa::store(slice + i * kTileK, even);
      Isa::store(slice + i * kTileK + Isa::L, odd);
    }
  }
  static void decode_slices(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, Slice* slices) {
    for (int64_t c = 0; c < k_count; c += kTileK)  // all whole: K is a multiple of 64
      decode_slice(w, k + c, kTileK, n, n_count, *slices++);
  }
};

}  // namespace
}  // namespace nf4::cpu
