// linear_dgrad: dX[M, K] = dY[M, N] @ W[N, K] on tensor cores, from the same bytes, though the contraction runs across
// the rows of W.
//
// Who: a block owns kWarpsK * 64 columns of W by kWarpsM * 8 kTokenTiles rows of dY (tokens) and one of `splits` parts of
//   N. Its warps are kWarpsK x kWarpsM x kWarpsN, the last to share out the groups of 32 n in a stage.
// Trick: W^T is mma's A operand. A lane (g = lane / 4, t = lane % 4) takes the 8 k from 8g on, one word, of each of its
//   4 rows n = 4t.. of 16. Which of the 64 k stands in which row of the four 16-row tiles is free: tile i has 8g + 2i in row
//   g and 8g + 2i + 1 in row g + 8, so that the lane ends with 8 consecutive k of dX, 16 bytes. The table gives pairs
//   along k, mma wants pairs along n: two byte permutes turn two pairs around. The scale belongs to n, which is summed
//   over, so it goes to an operand, as two numbers in T, rounded once in all: {s_n, s_n+1} times the pair. With the level
//   that is two roundings, their error together 1.6 times dense bf16's at most. Rejected: a scale rounded to T, whose error
//   adds up where many blocks have one scale (weights clamped at 2 sigma, dY of mean one sigma: 2.2 % of the output, dense
//   0.3 %); scaling dY in fp32, 2.5 instructions a weight at 64 tokens.
// Limits: 32 n of 64 k by 64 tokens take a warp 64 mma's, 413 cycles of a quarter of an SM (sm_90), and 427 instructions:
//   of a weight's 6.7, 0.5 are table loads, 1 forms their addresses, 0.5 turns pairs around, 1 is for the scales.
// Time: 2 M N K flops; M = 512, 4096 x 4096 at 588 TFLOP/s (an H200's mma.sync): 29 us.
// Needs: bf16 or fp16, has_whole_codes(weight), N % 8 == 0, all pointers aligned to 16 bytes.
#include <type_traits>

#include "choose.h"
#include "pair_table.cuh"
#include "tile.cuh"
#include "turned.cuh"

namespace nf4::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kGroup = 32;  // n a warp multiplies at a time: two steps of mma

template <int kWarpsK_, int kWarpsM_, int kWarpsN_, int kTokenTiles_, int kStageN_>
struct Shape {
  static constexpr int kWarpsK = kWarpsK_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kTokenTiles = kTokenTiles_;
  static constexpr int kThreads = kWarpsK * kWarpsM * kWarpsN * kWarp;
  static constexpr int kStageN = kStageN_;  // rows of W
  static constexpr int kColumns = kWarpsK * kBlockK, kTokens = kWarpsM * 8 * kTokenTiles;
  // 32 bytes more every 4 rows put the rows that a warp's four t read at once into different banks.
  static constexpr int kPackedPitch = kColumns / 2, kPackedBytes = kStageN * kPackedPitch + kStageN / 4 * 32;
  static constexpr int kTokenBytes = kTokens * kStageN * 2, kStageBytes = kPackedBytes + kTokenBytes;
  static constexpr int kSharedBytes = kPairTableBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= kSharedMost, "every architecture has so much");
  static_assert(kStageN % (kGroup * kWarpsN) == 0, "a stage is whole groups for every warp");
  static_assert(kPackedPitch % 16 == 0 && kPackedPitch * 4 % 128 == 0, "rows 4 apart begin at the same bank");
  static_assert(kTokens * kColumns * 4 <= kSharedBytes || kWarpsN == 1, "the warps of n add up in all of it");
};

// In bf16 the scale is multiplied to dY, whose error is then another one in every row and token; in fp16 to the levels:
// dY times a scale could leave the range where dY times W does not.
template <class T>
constexpr bool kScalesTokens = std::is_same_v<T, BFloat16>;

// Pairs of scales as T's nearest and the rest in T.
template <class T>
struct PairScales {
  uint32_t high[4], low[4];
  NF4_DEVICE uint32_t times(uint32_t pair, int i) const {
    return multiply_add_pairs<T>(pair, high[i], multiply_pairs<T>(pair, low[i]));
  }
};

template <class T, class S>
struct TiledDgrad {
  const ProductArgs& args;
  const Weight& w;
  Lane lane;
  int warp_k, warp_m, warp_n;
  int64_t tile_column, tile_token;
  int N;
  Share<S::kStageN, S::kPackedPitch / 16, S::kThreads> packed_share;
  const uint8_t* packed;  // this thread's piece of row 0
  RowFetcher<S::kTokens, S::kStageN / 8, Order::kPieceInPairs, S::kThreads> token_fetcher;
  unsigned char* stages;

  NF4_DEVICE explicit TiledDgrad(const ProductArgs& args)
      : args(args),
        w(args.weight),
        warp_k(int(threadIdx.x) / kWarp % S::kWarpsK),
        warp_m(int(threadIdx.x) / (kWarp * S::kWarpsK) % S::kWarpsM),
        warp_n(int(threadIdx.x) / (kWarp * S::kWarpsK * S::kWarpsM)),
        tile_column(int64_t(blockIdx.x) * S::kColumns),
        tile_token(int64_t(blockIdx.y) * S::kTokens),
        N(int(args.weight.N)),
        packed(w.packed + smaller(tile_column + 32 * packed_share.piece, w.K - 32) / 2),
        token_fetcher(args.x, tile_token, args.M, args.weight.N * 2),
        stages(shared_memory<unsigned char>() + kPairTableBytes) {}

  NF4_DEVICE int64_t column() const { return tile_column + warp_k * kBlockK; }  // of this warp's 64
  NF4_DEVICE int token_in_tile(int m) const { return (warp_m * S::kTokenTiles + m) * 8; }

  // Of a stage: kStageN rows of packed bytes, and [kTokens, kStageN] of dY.
  NF4_DEVICE unsigned char* packed_row(int stage, int n) const {
    return stages + stage * S::kStageBytes + n * S::kPackedPitch + n / 4 * 32;
  }
  NF4_DEVICE unsigned char* token_tile(int stage) const { return stages + stage * S::kStageBytes + S::kPackedBytes; }

  // Rows [n, n + kStageN) of W and of dY^T. Beyond N these are zeros of dY; of W, there and beyond K, it is the last row
  // and piece once more.
  NF4_DEVICE void fetch(int stage, int n) const {
    token_fetcher.fetch(token_tile(stage), uint32_t(n) * 2, n + 8 * token_fetcher.piece < N);
    using Threads = decltype(packed_share);
#pragma unroll
    for (int i = 0; i < Threads::kCount; ++i) {
      const int row = packed_share.row + i * Threads::kRowStep;
      copy_async_16(packed_row(stage, row) + 16 * packed_share.piece, packed + min(n + row, N - 1) * (w.K / 2));
    }
  }

  // A lane decodes the scale of row n + lane of its group.
  NF4_DEVICE int64_t scale_index(int n) const { return ((n + lane.index) * w.K + column()) >> w.block_shift; }
  NF4_DEVICE bool has_scale(int n) const { return n + lane.index < N && column() < w.K; }
  NF4_DEVICE uint32_t stored(int n) const { return has_scale(n) ? stored_scale(w, scale_index(n)) : 0; }

  // The scales, times the table's factor, of the pairs along n, two in each of a group's two steps; zeros beyond N.
  NF4_DEVICE PairScales<T> pair_scales(int n, uint32_t stored, float factor) const {
    const float own = has_scale(n) ? scale_of(w, scale_index(n), stored) * factor : 0.f;
    const float next = shuffle_xor(own, 1);
    const uint32_t high = pack<T>(own, next);  // right in even lanes
    const uint32_t low = pack<T>(own - first_of<T>(high), next - second_of<T>(high));
    PairScales<T> pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 16 * (i / 2) + 4 * lane.t + 2 * (i % 2);
      pairs.high[i] = shuffle(high, from);
      pairs.low[i] = shuffle(low, from);
    }
    return pairs;
  }

  // sums += W[32 n, 64 k]^T @ dY^T of group `group` in the stage.
  NF4_DEVICE void multiply(TurnedSums<S::kTokenTiles>& sums, int stage, int group, const PairScales<T>& scales,
                           const PairTable& table) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // 4 n a lane
      uint32_t pairs[kTiles][4];            // along k, of n = 16 step + 4t + 0..3
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned char* row = packed_row(stage, group * kGroup + 16 * step + 4 * lane.t + i);
        const uint32_t word = *reinterpret_cast<const uint32_t*>(row + warp_k * kBlockK / 2 + 4 * lane.g);
        pairs[0][i] = table.pair<0>(word);
        pairs[1][i] = table.pair<1>(word);
        pairs[2][i] = table.pair<2>(word);
        pairs[3][i] = table.pair<3>(word);
      }
      uint32_t a[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        turn(a[tile], pairs[tile]);
        if constexpr (!kScalesTokens<T>)
#pragma unroll
          for (int i = 0; i < 4; ++i) a[tile][i] = scales.times(a[tile][i], 2 * step + i / 2);
      }
      const int piece = (group * kGroup + 16 * step + 4 * lane.t) / 8;
      const unsigned char* dys = token_tile(stage) + (token_in_tile(0) + lane.g) * S::kStageN * 2 +
                                 16 * place<Order::kPieceInPairs, S::kStageN / 8>(piece, lane.g) + 8 * (lane.t % 2);
#pragma unroll
      for (int m = 0; m < S::kTokenTiles; ++m) {
        uint2 dy = *reinterpret_cast<const uint2*>(dys + m * 8 * S::kStageN * 2);
        if constexpr (kScalesTokens<T>) dy = make_uint2(scales.times(dy.x, 2 * step), scales.times(dy.y, 2 * step + 1));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_16x8x16<T>(sums[tile][m], a[tile], dy.x, dy.y);
      }
    }
  }

  // sums = scaling * A[rank, 64 k]^T @ Q^T, 4 ranks a lane and step.
  NF4_DEVICE void begin_with_low_rank(TurnedSums<S::kTokenTiles>& sums) const {
    const T* factor = static_cast<const T*>(args.low_rank_factor);
    const T* q = static_cast<const T*>(args.low_rank_x);
    for (int64_t step = 0; step < args.rank; step += 16) {
      const int64_t r = step + 4 * lane.t;
      uint32_t a[kTiles][4];
      load_turned(a, factor + r * w.K + column() + 8 * lane.g, r, args.rank, w.K, column() < w.K);
#pragma unroll
      for (int m = 0; m < S::kTokenTiles; ++m) {
        const int64_t token = tile_token + token_in_tile(m) + lane.g;
        const T* row = q + token * args.rank;
        const uint32_t b0 = token < args.M ? load_pair(row, r, args.rank) : 0;
        const uint32_t b1 = token < args.M ? load_pair(row, r + 2, args.rank) : 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_16x8x16<T>(sums[tile][m], a[tile], b0, b1);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int m = 0; m < S::kTokenTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][m][i] *= args.scaling;
  }

  // Adds the sums of the warps of n in order, in the first of them, and stores them from there.
  NF4_DEVICE void finish(TurnedSums<S::kTokenTiles>& sums, int64_t split) const {
    constexpr int kValues = kTiles * S::kTokenTiles * 4, kOwners = S::kWarpsK * S::kWarpsM * kWarp;
    float* others = shared_memory<float>() + int(threadIdx.x) % kOwners;  // [kValues, kOwners]
    for (int n = 1; n < S::kWarpsN; ++n) {
      sync_block();  // the stages' and the table's last reader, or the first warps having read those before
      if (warp_n == n)
        for (int i = 0; i < kValues; ++i)
          others[i * kOwners] = sums[i / (S::kTokenTiles * 4)][i / 4 % S::kTokenTiles][i % 4];
      sync_block();
      if (warp_n == 0)
        for (int i = 0; i < kValues; ++i)
          sums[i / (S::kTokenTiles * 4)][i / 4 % S::kTokenTiles][i % 4] += others[i * kOwners];
    }
    if (warp_n != 0) return;
    const Store<T> store(args, w.K, split);
#pragma unroll
    for (int m = 0; m < S::kTokenTiles; ++m)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t token = tile_token + token_in_tile(m) + 2 * lane.t + odd;
        float values[8];
        eight_columns<S::kTokenTiles>(values, sums, m, odd);
        if (token < args.M) store.template run<8>(token, column() + 8 * lane.g, values);
      }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) linear_dgrad_tiled_kernel(const ProductArgs args) {
  const TiledDgrad<T, S> product(args);
  const Part steps(ceil_div(args.weight.N, S::kStageN), blockIdx.z, args.splits);
  const int begin = int(steps.begin), end = int(steps.end);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) product.fetch(s, (begin + s) * S::kStageN);
    copy_async_commit();
  }
  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  const PairTable table(words, product.lane.index);

  TurnedSums<S::kTokenTiles> sums = {};
  if (args.rank > 0 && blockIdx.z == 0 && product.warp_n == 0) product.begin_with_low_rank(sums);
  // Groups of 32 n that this warp takes of a stage, and their scales a group ahead.
  constexpr int kGroups = S::kStageN / (kGroup * S::kWarpsN);
  const auto row_of = [&](int step, int i) { return step * S::kStageN + (i * S::kWarpsN + product.warp_n) * kGroup; };
  uint32_t stored = product.stored(row_of(begin, 0));
  int stage = 0, free = kStages - 1;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // the stage is there for all, and the one before it has been read by all
    if (step + kStages - 1 < end) product.fetch(free, (step + kStages - 1) * S::kStageN);
    copy_async_commit();
#pragma unroll 1
    for (int i = 0; i < kGroups; ++i) {
      const PairScales<T> scales = product.pair_scales(row_of(step, i), stored, factor);
      stored = i + 1 < kGroups ? product.stored(row_of(step, i + 1)) : product.stored(row_of(step + 1, 0));
      product.multiply(sums, stage, i * S::kWarpsN + product.warp_n, scales, table);
    }
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  product.finish(sums, blockIdx.z);
}

template <class T, class S>
cudaError_t launch_shape(const ProductArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.weight.K, S::kColumns)), unsigned(ceil_div(args.M, S::kTokens)),
                  unsigned(args.splits));
  return launch(linear_dgrad_tiled_kernel<T, S>, grid, S::kThreads, S::kSharedBytes, stream, args);
}

using Tokens16 = Shape<2, 1, 4, 2, 128>;
using Tokens64 = Shape<2, 1, 2, 8, 64>;
using Tokens128 = Shape<4, 2, 1, 8, 32>;
template <class S>
constexpr bool is(const Tile& tile) {
  return tile.columns == S::kColumns && tile.rows == S::kTokens && tile.step == S::kStageN;
}
static_assert(is<Tokens16>(kDgradTiles[0]) && is<Tokens64>(kDgradTiles[1]) && is<Tokens128>(kDgradTiles[2]),
              "the shapes that choose.h counts on");

template <class T>
cudaError_t launch_for(const ProductArgs& args, cudaStream_t stream) {
  switch (tile_index(kDgradTiles, args.M)) {
    case 0: return launch_shape<T, Tokens16>(args, stream);
    case 1: return launch_shape<T, Tokens64>(args, stream);
    default: return launch_shape<T, Tokens128>(args, stream);
  }
}

}  // namespace

cudaError_t linear_dgrad_tiled(const ProductArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
