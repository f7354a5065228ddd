// bf16 products for gemm.h by bfmmla: a register of x [2 rows][4 d] times one of B [2 columns][4 d] adds to a register
// of sums [2][2], 16 products an instruction, where bfdot has 8. Read first: gemm.h.
//
//   panel of x, kStep = 4   | m 0: d 0-3 | m 1: d 0-3 | m 2: d 0-3 | ..      two rows a load; an odd last one twice
//   Slice of B              | c 0: d 0-3 | c 1: d 0-3 | .. c 15      | c 0: d 4-7 | ..
//   sums[p][q], 4 lanes     m 2p, c 2q | m 2p, c 2q+1 | m 2p+1, c 2q | m 2p+1, c 2q+1
//
// Registers    6 x 16 sums are 24 of them, with 3 of x and one of B at a time: 11 loads for 24 bfmmla. (8 x 8 takes 8
//              loads for 16, and 16 columns are what decode_span.h's users write.)
// Rounding     bfmmla and bfdot round a sum of products to odd and take subnormals as zero, which is below an ulp of
//              fp32 with either sign: nothing beside the rounding of x and W to bf16.
#pragma once

#include "codes_neon_bf16.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

template <int TILE_M>
struct Sums {
  static constexpr int kPairs = (TILE_M + 1) / 2, kColumns = kDecodedTileC / 2;  // of rows, of columns
  float32x4_t of[kPairs][kColumns];

  template <class Body>
  static void each(Body body) {
#pragma GCC unroll 3
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
      for (int q = 0; q < kColumns; ++q) body(p, q);
  }
  void clear() {
    each([&](int p, int q) { of[p][q] = vdupq_n_f32(0); });
  }
  // Those of `count` d, a multiple of 4.
  void add_products(const BFloat16* x, const BFloat16* b, int64_t count) {
    for (int64_t d = 0; d < count; d += 4, x += 4 * TILE_M, b += 4 * kDecodedTileC) {
      bfloat16x8_t rows[kPairs];
#pragma GCC unroll 3
      for (int p = 0; p < kPairs; ++p) {
        if (2 * p + 1 < TILE_M) {
          rows[p] = load_bf16(x + 8 * p);
        } else {
          uint64_t row;
          std::memcpy(&row, x + 8 * p, sizeof row);
          rows[p] = vreinterpretq_bf16_u64(vdupq_n_u64(row));
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < kColumns; ++q) {
        // No register of b is loaded before it is needed: all 8 at once would leave too few for the sums.
        __asm__ volatile("");
        const bfloat16x8_t columns = load_bf16(b + 8 * q);
#pragma GCC unroll 3
        for (int p = 0; p < kPairs; ++p) of[p][q] = vbfmmlaq_f32(of[p][q], rows[p], columns);
      }
    }
  }
  // tile [TILE_M][kDecodedTileC].
  void add_to(float* tile, bool is_first) const {
#pragma GCC unroll 3
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < kColumns; q += 2) {
        const float64x2_t a = vreinterpretq_f64_f32(of[p][q]), b = vreinterpretq_f64_f32(of[p][q + 1]);
        const float32x4_t rows[2] = {vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b))};
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          if (2 * p + r >= TILE_M) break;
          float* out = tile + (2 * p + r) * kDecodedTileC + 2 * q;
          vst1q_f32(out, is_first ? rows[r] : vaddq_f32(rows[r], vld1q_f32(out)));
        }
      }
  }
};

struct Bf16Core {
  using Element = BFloat16;
  using Slice = Element[kSliceD * kDecodedTileC];
  static constexpr int kStep = 4, kPanelStep = kStep, kTileM = 6, kTileC = kDecodedTileC;
  static void put(Element* out, float a) { *out = from_float<BFloat16>(a); }
  static void pack(Element* out, const BFloat16* x) { std::memcpy(out, x, 8); }
  template <int TILE_M>
  static void multiply(const GemmArgs&, const Element* x, const Slice& slice, int64_t d_count, bool is_first,
                       float* tile) {
    Sums<TILE_M> sums;
    sums.clear();
    sums.add_products(x, slice, d_count);
    sums.add_to(tile, is_first);
  }
};

// GemmPackFn.
inline void pack_bf16(const void* x, Dtype, int64_t M, int64_t D, int64_t tile_begin, int64_t tile_end, void* panel) {
  pack_tiles<Bf16Core>(static_cast<const BFloat16*>(x), M, D, tile_begin, tile_end, static_cast<BFloat16*>(panel));
}

}  // namespace
}  // namespace nf4::cpu
