// linear on tensor cores, a warp's share: y[M, N] = x[M, K] @ W[N, K]^T for 32 n by 8 kTilesM m, W from packed bytes in
// registers. Read first: mma_16x8x16 in device.cuh, pair_table.cuh.
//
// W is mma's A operand (its 16 rows are n), x^T is B (its 8 columns are m), the contraction is k. Lane 4g + t takes
// rows g, g + 8, g + 16, g + 24 of W (slots 0 to 3) and, of each 64 k, the 16 consecutive k from 16t on, which are 8
// packed bytes. A contraction has no order, so these 16 k stand in the places that mma calls 2t, 2t + 1, 2t + 8, 2t + 9
// of four k-steps, and x is loaded in the same order, 16 bytes a load:
//
//   half            0                           1                x:  vector 2t + half of row g of each 8 m, one uint4
//   k - 16t     0 1  2 3 | 4 5  6 7      8 9 10 11 | 12 13 14 15       .x .y for the first mma, .z .w for the second
//   byte         0    1  |  2    3        4    5   |   6     7   W:  a pair of elements a byte, by one table load
//   mma's k     2t  2t+8 | 2t  2t+8      2t  2t+8  |  2t   2t+8
//
// So neither W nor x is ever rearranged. Where 64 k share a scale (ScaledSums), levels are multiplied unscaled and the
// block scale multiplies the fp32 sum of each 64 k: that is exact. Else (ScaledLevels) the scale of the lane's 16 k
// multiplies the levels of a slot, as two numbers in T and rounded once in all: as Ŵ in T is, where the levels are exact
// in T, as E2M1 and integers are. Rejected there: sums of 16 k, for each of which a tile of 8 m would need 8 multiply-adds
// more: at 64 m 9.3 instructions a weight by count; a scale decoded by shifts (E8M0, E4M3), 1 to 3 instructions instead
// of the 2 that look it up, once in 16 weights.
#pragma once

#include "pair_table.cuh"
#include "product.cuh"

namespace nf4::cuda {

constexpr int kTilesN = 2;                // mma tiles of 16 n a warp
constexpr int kWarpTileN = 16 * kTilesN;  // n a warp
constexpr int kSlots = 2 * kTilesN;       // rows of W a lane: n = g + 8 * slot

// Accumulators [mma tile of 16 n][mma tile of 8 m][c fragment].
template <int kTilesM>
using Sums = float[kTilesN][kTilesM][4];

// sums += scale * part. Lane 4g + t holds the scale of n = g + 8t.
template <int kTilesM>
NF4_DEVICE void add_scaled(Sums<kTilesM>& sums, const Sums<kTilesM>& part, float scale) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float low = shuffle_four(scale, 2 * n), high = shuffle_four(scale, 2 * n + 1);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][m][i] = fmaf(i < 2 ? low : high, part[n][m][i], sums[n][m][i]);
  }
}

// sums += W[32 n, 64 k] @ x^T. `words` hold the lane's 16 k of each slot; scaled(pair, slot) are two of its levels as
// they are multiplied; load_x(m, half) returns the lane's first or second 8 k of row 8m + g of x.
template <class T, int kTilesM, class Table, class ScaledPair, class LoadX>
NF4_DEVICE void multiply_block(Sums<kTilesM>& sums, const uint2 (&words)[kSlots], const Table& table,
                               ScaledPair&& scaled, LoadX&& load_x) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 8 k a lane: two k-steps
    uint32_t first[kTilesN][4], second[kTilesN][4];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t word = half == 0 ? words[slot].x : words[slot].y;
      const int n = slot / 2, i = slot % 2;  // row g or g + 8 of the mma tile
      first[n][i] = scaled(table.template pair<0>(word), slot);
      first[n][i + 2] = scaled(table.template pair<1>(word), slot);
      second[n][i] = scaled(table.template pair<2>(word), slot);
      second[n][i + 2] = scaled(table.template pair<3>(word), slot);
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const uint4 x = load_x(m, half);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) mma_16x8x16<T>(sums[n][m], first[n], x.x, x.y);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) mma_16x8x16<T>(sums[n][m], second[n], x.z, x.w);
    }
  }
}

// sums += B[32 n, rank] @ P^T: B in place of W and P in place of x, whose rows the lane has at B + n and P + m. The loads
// of kAtOnce mma's of ranks are in flight before the first product.
template <bool kFours, class T, int kTilesM>
NF4_DEVICE void multiply_lora(Sums<kTilesM>& sums, const T* B, const uint32_t (&n)[kSlots], const T* P,
                              const uint32_t (&m)[kTilesM], int rank, int t) {
  constexpr int kRanks = 4 * kLaneRanks<kFours>, kAtOnce = kFours ? 2 : 1;
#pragma unroll 1
  for (int first = 0; first < rank; first += kAtOnce * kRanks) {
    uint2 b[kAtOnce][kSlots], p[kAtOnce][kTilesM];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = first + i * kRanks + kLaneRanks<kFours> * t;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) b[i][slot] = load_ranks<kFours>(B + n[slot], r, rank);
#pragma unroll
      for (int tile = 0; tile < kTilesM; ++tile) p[i][tile] = load_ranks<kFours>(P + m[tile], r, rank);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kRanks >= rank) break;
#pragma unroll
      for (int tile_n = 0; tile_n < kTilesN; ++tile_n) {
        const uint2 row = b[i][2 * tile_n], row_8 = b[i][2 * tile_n + 1];
        const uint32_t a[4] = {row.x, row_8.x, row.y, row_8.y};
#pragma unroll
        for (int tile = 0; tile < kTilesM; ++tile) mma_16x8x16<T>(sums[tile_n][tile], a, p[i][tile].x, p[i][tile].y);
      }
    }
  }
}

// The LoRA term, sums += scaling * B[32 n, rank] @ P^T. Rows past N and M repeat the last one: their results are not
// stored.
template <class T, int kTilesM, class Work>
NF4_DEVICE void add_lora_term(Sums<kTilesM>& sums, const ProductArgs& args, const Work& work, int64_t n_begin,
                              int64_t m_begin, const Lane& lane) {
  const int rank = int(args.rank);
  n_begin = smaller(n_begin, args.weight.N - 1);
  m_begin = smaller(m_begin, args.M - 1);
  const int last_n = int(smaller(args.weight.N - n_begin, kWarpTileN)) - 1;
  const int last_m = int(smaller(args.M - m_begin, 8 * kTilesM)) - 1;
  const T* B = work.template own<T>(args.lora_factor, args.weight.N * args.rank) + n_begin * args.rank;
  const T* P = static_cast<const T*>(args.lora_inner) + m_begin * args.rank;
  uint32_t n[kSlots], m[kTilesM];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) n[slot] = uint32_t(min(lane.g + 8 * slot, last_n)) * uint32_t(rank);
#pragma unroll
  for (int tile = 0; tile < kTilesM; ++tile) m[tile] = uint32_t(min(lane.g + 8 * tile, last_m)) * uint32_t(rank);
  Sums<kTilesM> part = {};
  if (has_fours(B, args.rank) && has_fours(P, args.rank))
    multiply_lora<true>(part, B, n, P, m, rank, lane.t);
  else
    multiply_lora<false>(part, B, n, P, m, rank, lane.t);
#pragma unroll
  for (int i = 0; i < kTilesN; ++i)
#pragma unroll
    for (int tile = 0; tile < kTilesM; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][tile][j] = fmaf(args.scaling, part[i][tile][j], sums[i][tile][j]);
}

// Byte offsets of the lane's 8 packed bytes in each of its rows, n_begin + g + 8 slot, of the first 64 k, from row
// tile_begin on.
NF4_DEVICE void row_offsets(uint32_t (&rows)[kSlots], const Weight& w, int64_t tile_begin, int64_t n_begin,
                            const Lane& lane) {
  constexpr int kMostRows = 128;  // of a tile
  const int K = int(w.K), begin = int(n_begin - tile_begin), last = int(smaller(w.N - tile_begin, kMostRows)) - 1;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    rows[slot] = uint32_t(min(begin + lane.g + 8 * slot, last)) * (K / 2) + 8 * lane.t;
}

// The scales of a warp's 32 rows, in two forms with the same members. Rows past N repeat the last one: their results are
// not stored, and no load needs a predicate. Blocks are numbered by 32 bits, a register less than by 64.
template <class Scaled>
struct RowScales;

// Lane 4g + t decodes the scale of row n = g + 8t for the warp.
template <>
struct RowScales<ScaledSums> {
  using Stored = StoredScales<1>;
  const Weight& w;
  uint32_t first;  // the row's first block of 64 k
  float offset;
  NF4_DEVICE RowScales(const Weight& w, int64_t, int64_t n_begin, const Lane& lane)
      : w(w),
        first(uint32_t(smaller(n_begin + lane.g + 8 * lane.t, w.N - 1) * (w.K / kBlockK))),
        offset(offset_of(w)) {}

  NF4_DEVICE uint32_t index(int block) const { return (first + uint32_t(block)) >> (w.block_shift - 6); }
  NF4_DEVICE Stored stored(int block, const uint32_t (&)[kSlots]) const {
    return load_scales<1>(w, scales_in<ScaledSums>(w), [&](int) { return index(block); });
  }

  // sums += W[32 n, 64 k] @ x^T, as multiply_block says. `factor` is the pair table's.
  template <class T, int kTilesM, class LoadX>
  NF4_DEVICE void multiply(Sums<kTilesM>& sums, int block, const Stored& stored, const uint32_t (&)[kSlots],
                           const uint2 (&words)[kSlots], const PairTable& table, float factor, LoadX&& load_x) const {
    float scale[1];
    decode_scales(scale, w, scales_in<ScaledSums>(w), stored, offset, [&](int) { return index(block); });
    Sums<kTilesM> part = {};
    multiply_block<T, kTilesM>(part, words, table, [](uint32_t pair, int) { return pair; }, load_x);
    add_scaled<kTilesM>(sums, part, scale[0] * factor);
  }
};

// Each lane decodes the scales of its own 16 k in its own kSlots rows, whose places in a tile that begins at row
// `tile_begin` it has in registers for the packed bytes already.
template <>
struct RowScales<ScaledLevels> {
  using Stored = StoredScales<kSlots>;
  const Weight& w;
  uint32_t first;  // the tile's first block of 16 k
  float offset;
  NF4_DEVICE RowScales(const Weight& w, int64_t tile_begin, int64_t, const Lane&)
      : w(w), first(uint32_t(tile_begin * (w.K / 16))), offset(offset_of(w)) {}

  NF4_DEVICE uint32_t index(uint32_t row, int block) const {
    return (first + (row + 32 * uint32_t(block)) / 8) >> (w.block_shift - 4);
  }
  NF4_DEVICE Stored stored(int block, const uint32_t (&rows)[kSlots]) const {
    return load_scales<kSlots>(w, w.scales, [&](int slot) { return index(rows[slot], block); });
  }

  template <class T, int kTilesM, class LoadX>
  NF4_DEVICE void multiply(Sums<kTilesM>& sums, int block, const Stored& stored, const uint32_t (&rows)[kSlots],
                           const uint2 (&words)[kSlots], const PairTable& table, float factor, LoadX&& load_x) const {
    float values[kSlots];
    decode_scales(values, w, w.scales, stored, offset, [&](int slot) { return index(rows[slot], block); });
    ScalePair<T> scales[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) scales[slot] = ScalePair<T>(values[slot] * factor, values[slot] * factor);
    multiply_block<T, kTilesM>(
        sums, words, table, [&](uint32_t pair, int slot) { return scales[slot].times(pair); }, load_x);
  }
};

}  // namespace nf4::cuda
