// A warp's share of linear: 32 rows of W by 8 kTokenTiles rows of x (tokens), from packed bytes in registers.
//
// The weights are mma's A operand. A lane (g = lane / 4, t = lane % 4) holds rows g, g + 8, g + 16, g + 24 and, of each
// 64 k, the 16 from 16t on. The order of a contraction is free: these 16 stand where mma wants k = 2t, 2t + 1, 2t + 8,
// 2t + 9 of four steps, and x is read in the same order, 16 bytes a load. So neither W nor x is ever rearranged.
// Levels are multiplied unscaled and the scale goes onto the fp32 sum of each 64 k: exact, where a scaled bf16 weight is
// rounded three times.
#pragma once

#include "pair_table.cuh"
#include "product.cuh"

namespace nf4::cuda {

constexpr int kRowTiles = 2;               // of 16 rows of W
constexpr int kWarpRows = 16 * kRowTiles;  // of W
constexpr int kSlots = 2 * kRowTiles;      // rows of W a lane holds: g + 8 * slot

// [row tile][token tile][the four of a c fragment].
template <int kTokenTiles>
using Sums = float[kRowTiles][kTokenTiles][4];

// sums += part, each row of W times its scale; a lane's `scale` is that of row g + 8t.
template <int kTokenTiles>
NF4_DEVICE void add_scaled(Sums<kTokenTiles>& sums, const Sums<kTokenTiles>& part, float scale) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const float low = shuffle_four(scale, 2 * tile), high = shuffle_four(scale, 2 * tile + 1);
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][m][i] = fmaf(i < 2 ? low : high, part[tile][m][i], sums[tile][m][i]);
  }
}

// sums += W[32 rows, 64 k] @ x^T. `words` are the lane's 16 k of each slot; x(m, half) are, of token 8m + g, the lane's
// first or second 8 k.
template <class T, int kTokenTiles, class LoadX>
NF4_DEVICE void multiply_block(Sums<kTokenTiles>& sums, const uint2 (&words)[kSlots], float scale,
                               const PairTable& table, LoadX&& x) {
  Sums<kTokenTiles> part = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 8 k a lane: two steps of mma
    uint32_t first[kRowTiles][4], second[kRowTiles][4];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t word = half == 0 ? words[slot].x : words[slot].y;
      const int tile = slot / 2, i = slot % 2;  // row g or g + 8 of the tile
      first[tile][i] = table.pair<0>(word);
      first[tile][i + 2] = table.pair<1>(word);
      second[tile][i] = table.pair<2>(word);
      second[tile][i + 2] = table.pair<3>(word);
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const uint4 tokens = x(m, half);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) mma_16x8x16<T>(part[tile][m], first[tile], tokens.x, tokens.y);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) mma_16x8x16<T>(part[tile][m], second[tile], tokens.z, tokens.w);
    }
  }
  add_scaled<kTokenTiles>(sums, part, scale);
}

// sums += scaling * B[32 rows, rank] @ P^T: LoRA's term is more of the same contraction.
template <class T, int kTokenTiles>
NF4_DEVICE void add_low_rank(Sums<kTokenTiles>& sums, const ProductArgs& args, int64_t first_row, int64_t first_token,
                             const Lane& lane) {
  Sums<kTokenTiles> part = {};
  const T* factor = static_cast<const T*>(args.low_rank_factor);
  const T* tokens = static_cast<const T*>(args.low_rank_x);
  for (int64_t step = 0; step < args.rank; step += 16) {
    const int64_t r = step + 2 * lane.t;
    uint32_t a[kRowTiles][4];
    for (int tile = 0; tile < kRowTiles; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + 16 * tile + lane.g + 8 * (i % 2);
        a[tile][i] = row < args.weight.N ? load_pair(factor + row * args.rank, r + 8 * (i / 2), args.rank) : 0;
      }
    for (int m = 0; m < kTokenTiles; ++m) {
      const int64_t token = first_token + 8 * m + lane.g;
      const T* p = tokens + token * args.rank;
      const uint32_t b0 = token < args.M ? load_pair(p, r, args.rank) : 0;
      const uint32_t b1 = token < args.M ? load_pair(p, r + 8, args.rank) : 0;
      for (int tile = 0; tile < kRowTiles; ++tile) mma_16x8x16<T>(part[tile][m], a[tile], b0, b1);
    }
  }
  add_scaled<kTokenTiles>(sums, part, args.scaling);
}

// The scale of row g + 8t of a warp's rows, which the lane decodes for all. Beyond N it is the last row's: what comes of
// it is not stored, and no load needs a condition.
struct RowScale {
  const Weight& w;
  uint32_t first;  // of the row, in 64 weights: a register less than in weights, and no sums of 64 bits
  float offset;
  NF4_DEVICE RowScale(const Weight& w, int64_t first_row, const Lane& lane)
      : w(w),
        first(uint32_t(smaller(first_row + lane.g + 8 * lane.t, w.N - 1) * (w.K / kBlockK))),
        offset(offset_of(w)) {}

  NF4_DEVICE uint32_t index(int block) const { return (first + uint32_t(block)) >> (w.block_shift - 6); }
  NF4_DEVICE uint32_t stored(int block) const { return stored_scale(w, index(block)); }
  // Times the factor that goes with the table.
  NF4_DEVICE float decode(int block, uint32_t stored, float factor) const {
    return scale_of(w, index(block), stored, offset) * factor;
  }
};

}  // namespace nf4::cuda
