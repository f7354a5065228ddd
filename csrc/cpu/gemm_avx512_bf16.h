// bf16 products for gemm.h: vdpbf16ps adds pairs along D to fp32 sums, at twice the rate of fp32 FMAs.
// Read first: gemm.h.
//
//   register of B    lane c:  B[d, c] | B[d+1, c] << 16         x, broadcast    x[m, d] | x[m, d+1] << 16
//   vdpbf16ps        acc[m][c] += x[m, d] * B[d, c] + x[m, d+1] * B[d+1, c]
#pragma once

#include "decode_avx512.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

struct Bf16Core {
  using Element = BFloat16;
  using Slice = Element[kSliceD * kDecodedTileC];
  static constexpr int kStep = 2, kPanelStep = kStep, kTileM = Isa::kTileM, kTileC = kDecodedTileC;
  static constexpr int kRun = kSliceD;
  static Isa::F multiply_add(const Element* x, Isa::F b, Isa::F acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)b, (__m512bh)Isa::broadcast_pair(x));
  }
  static Isa::F load_weights(const Element* b) { return _mm512_loadu_ps(b); }
  static void put(Element* out, float a) { *out = from_float<BFloat16>(a); }
  static void pack(Element* out, const BFloat16* x) { std::memcpy(out, x, 4); }
  template <int TILE_M>
  static void multiply(const GemmArgs&, const Element* x, const Slice& b, int64_t d_count, bool is_first, float* tile) {
    multiply_decoded<Bf16Core, TILE_M>(x, b, d_count, is_first, tile);
  }
  // Lane i of `out` becomes the pair (first[i], second[i]), each rounded to nearest even.
  static void store_pairs(Element* out, Isa::F first, Isa::F second) {
    const Isa::I interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const Isa::I halves = (Isa::I)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, halves));
  }
};

// GemmPackFn.
inline void pack_bf16(const void* x, Dtype, int64_t M, int64_t D, int64_t tile_begin, int64_t tile_end, void* panel) {
  pack_tiles<Bf16Core>(static_cast<const BFloat16*>(x), M, D, tile_begin, tile_end, static_cast<BFloat16*>(panel));
}

}  // namespace
}  // namespace nf4::cpu
