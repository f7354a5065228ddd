// linear for many rows of x: y[M, N] = x[M, K] @ W[N, K]^T on tensor cores, W decoded in registers, never rearranged.
//
// Who: a block owns kWarpsN * 32 rows of W by kWarpsM * 8 kTokenTiles rows of x (tokens) and one of `splits` parts of K.
//   Its warps are kWarpsN x kWarpsM x kWarpsK, the last to share out the blocks of 64 k in a stage. How a warp
//   multiplies: linear.cuh; a decoded fragment of W serves all the warp's tokens before the next one is decoded.
// Trick: packed bytes and x come through three stages of cp.async; W is decoded on its way to the tensor cores, not into
//   shared memory (bitsandbytes 0.50), which would have to move 4 more bytes a weight.
// Limits: 64 k of 64 tokens take a warp 64 mma's, 413 cycles of a quarter of an SM (sm_90, 1270 multiply-adds a cycle and
//   SM), and 345 instructions. A weight takes 2 bytes of shared memory for the table, 0.5 packed and 4 of x: at those 20
//   weights a cycle 129 of 128 bytes; sm_80: 16 weights, 104 bytes; sm_86, 89, 120: 8 weights.
// Time: 2 M N K flops; M = 512, 4096 x 4096 at 569 TFLOP/s (an H200): 30 us.
// Needs: bf16 or fp16, has_whole_codes(weight), all pointers aligned to 16 bytes.
#pragma once

#include "choose.h"
#include "linear.cuh"
#include "tile.cuh"

namespace nf4::cuda {

template <int kWarpsN_, int kWarpsM_, int kWarpsK_, int kTokenTiles_>
struct LinearShape {
  static constexpr int kStages = 3;  // two on their way while one is multiplied: 92 KB with the table
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_, kTokenTiles = kTokenTiles_;
  static constexpr int kThreads = kWarpsN * kWarpsM * kWarpsK * kWarp;
  static constexpr int kRows = kWarpsN * kWarpRows, kTokens = kWarpsM * 8 * kTokenTiles;
  static constexpr int kPackedBytes = kRows * kBlockK / 2, kTokenBytes = kTokens * kBlockK * 2;  // of 64 k
  static constexpr int kStageBytes = kWarpsK * (kPackedBytes + kTokenBytes);
  static constexpr int kPitch = kRows + 4;  // floats a token of the finished tile: lanes write to banks 8t + g
  static constexpr int kSharedBytes = kPairTableBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= kSharedMost, "every architecture has so much");
  static_assert(kTokens * kPitch * 4 <= kSharedBytes, "the finished tile fits where table and stages were");
};

template <class T, class S, class Work>
struct TiledLinear {
  const ProductArgs& args;
  const Work& work;
  Lane lane;
  int warp_n, warp_m, warp_k;
  int64_t tile_row, tile_token;  // of W, of x
  int blocks;                    // of 64 k in a row
  RowFetcher<S::kRows, 2, Order::kPlain, S::kThreads> packed_fetcher;
  RowFetcher<S::kTokens, kBlockK / 8, Order::kEvenPieces, S::kThreads> token_fetcher;
  unsigned char* stages;

  NF4_DEVICE TiledLinear(const ProductArgs& args, const Work& work)
      : args(args),
        work(work),
        warp_n(int(threadIdx.x) / kWarp % S::kWarpsN),
        warp_m(int(threadIdx.x) / (kWarp * S::kWarpsN) % S::kWarpsM),
        warp_k(int(threadIdx.x) / (kWarp * S::kWarpsN * S::kWarpsM)),
        tile_row(int64_t(work.column_tile) * S::kRows),
        tile_token(work.row),
        blocks(int(work.weight.K / kBlockK)),
        packed_fetcher(work.weight.packed, tile_row, work.weight.N, work.weight.K / 2),
        token_fetcher(args.x, tile_token, work.end, work.weight.K * 2),
        stages(shared_memory<unsigned char>() + kPairTableBytes) {}

  // Of block k of the stage: [kRows, 32] packed bytes, and [kTokens, 64] of x.
  NF4_DEVICE unsigned char* packed_tile(int stage, int k) const {
    return stages + stage * S::kStageBytes + k * S::kPackedBytes;
  }
  NF4_DEVICE unsigned char* token_tile(int stage, int k) const {
    return packed_tile(stage, S::kWarpsK) + k * S::kTokenBytes;
  }

  // The step's blocks of k. Beyond the last it is the last once more, which no warp multiplies.
  NF4_DEVICE void fetch(int stage, int step) const {
#pragma unroll
    for (int k = 0; k < S::kWarpsK; ++k) {
      const uint32_t block = uint32_t(min(step * S::kWarpsK + k, blocks - 1));
      token_fetcher.fetch(token_tile(stage, k), block * (kBlockK * 2));
      packed_fetcher.fetch(packed_tile(stage, k), block * (kBlockK / 2));
    }
  }

  NF4_DEVICE void multiply(Sums<S::kTokenTiles>& sums, int stage, float scale, const PairTable& table) const {
    const unsigned char* packed = packed_tile(stage, warp_k) + (warp_n * kWarpRows + lane.g) * 32 + 8 * lane.t;
    uint2 words[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) words[slot] = *reinterpret_cast<const uint2*>(packed + 8 * slot * 32);
    const unsigned char* tokens =
        token_tile(stage, warp_k) + (warp_m * S::kTokenTiles * 8 + lane.g) * kBlockK * 2;  // of the warp's 8 tokens' g
    const int pieces[2] = {place<Order::kEvenPieces, kBlockK / 8>(2 * lane.t, lane.g),
                           place<Order::kEvenPieces, kBlockK / 8>(2 * lane.t + 1, lane.g)};
    multiply_block<T, S::kTokenTiles>(sums, words, scale, table, [&](int m, int half) {
      return *reinterpret_cast<const uint4*>(tokens + m * 8 * kBlockK * 2 + 16 * pieces[half]);
    });
  }

  // The sums of the warps of k in order, then y, four consecutive rows of W a thread.
  NF4_DEVICE void finish(const Sums<S::kTokenTiles>& sums) const {
    float* tile = shared_memory<float>();  // [kTokens, kPitch]
    for (int k = 0; k < S::kWarpsK; ++k) {
      sync_block();  // the stages' and the table's last reader, or the warps before
      if (warp_k != k) continue;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int m = 0; m < S::kTokenTiles; ++m)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int token = (warp_m * S::kTokenTiles + m) * 8 + 2 * lane.t + j % 2;
            float& at = tile[token * S::kPitch + warp_n * kWarpRows + 16 * i + lane.g + 8 * (j / 2)];
            at = k == 0 ? sums[i][m][j] : at + sums[i][m][j];
          }
    }
    sync_block();
    const Store<T> store(args, work.weight.N, work.split);
    for (int i = int(threadIdx.x); i < S::kTokens * S::kRows / 4; i += S::kThreads) {
      const int token = i / (S::kRows / 4), row = i % (S::kRows / 4) * 4;
      const float* from = tile + token * S::kPitch + row;
      const float four[4] = {from[0], from[1], from[2], from[3]};
      if (tile_token + token < work.end) store.template run<4>(tile_token + token, tile_row + row, four);
    }
  }
};

// The work of a block of threads.
template <class T, class S, class Work>
NF4_DEVICE void linear_tiled_block(const ProductArgs& args, const Work& work) {
  constexpr int kStages = S::kStages;
  const TiledLinear<T, S, Work> product(args, work);
  const int64_t first_row = product.tile_row + product.warp_n * kWarpRows;
  const RowScale row_scale(work.weight, first_row, product.lane);
  const Part steps(ceil_div(product.blocks, S::kWarpsK), work.split, args.splits);
  const int begin = int(steps.begin), end = int(steps.end), last = product.blocks - 1;
  const auto block_of = [&](int step) { return step * S::kWarpsK + product.warp_k; };
  const auto stored_scale_of = [&](int step) { return row_scale.stored(min(block_of(step), last)); };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) product.fetch(s, begin + s);
    copy_async_commit();
  }
  uint32_t stored = stored_scale_of(begin);
  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  const PairTable table(words, product.lane.index);

  Sums<S::kTokenTiles> sums = {};
  if (work.rank > 0 && work.split == 0 && product.warp_k == 0)
    add_low_rank<T, S::kTokenTiles>(sums, args, first_row, product.tile_token + product.warp_m * 8 * S::kTokenTiles,
                                    product.lane);
  int stage = 0, free = kStages - 1;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // the stage is there for all, and the one before it has been read by all
    if (step + kStages - 1 < end) product.fetch(free, step + kStages - 1);
    copy_async_commit();
    const uint32_t now = stored;
    stored = stored_scale_of(step + 1);
    if (block_of(step) <= last) product.multiply(sums, stage, row_scale.decode(block_of(step), now, factor), table);
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  product.finish(sums);
}

// Up to 64 tokens are one tile, of fewer rows of W, so that there are blocks enough to fill the machine.
using LinearTokens32 = LinearShape<2, 1, 2, 4>;
using LinearTokens64 = LinearShape<2, 1, 2, 8>;
using LinearTokens128 = LinearShape<4, 2, 1, 8>;
template <class S>
constexpr bool is_linear_tile(const Tile& tile) {
  return tile.columns == S::kRows && tile.rows == S::kTokens && tile.step == S::kWarpsK * kBlockK;
}
static_assert(is_linear_tile<LinearTokens32>(kLinearTiles[0]) && is_linear_tile<LinearTokens64>(kLinearTiles[1]) &&
                  is_linear_tile<LinearTokens128>(kLinearTiles[2]),
              "the shapes that choose.h counts on");

}  // namespace nf4::cuda
