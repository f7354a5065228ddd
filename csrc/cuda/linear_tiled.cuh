// linear for many rows of x: y[M, N] = x[M, K] @ W[N, K]^T on tensor cores, W decoded in registers, never rearranged.
// Read first: linear.cuh (how a warp multiplies), tile.cuh (the copies and the swizzle).
//
// Who: a block owns kTileM x kTileN of y and one of `splits` parts of K; its warps are kWarpsN x kWarpsM. A warp owns
//   32 n by 8 kTilesM m: a decoded fragment of W serves all its m before the next one is decoded. The last block of a
//   tile adds the splits up (split_sums.cuh).
// Trick: packed bytes and x come through cp.async stages; W is decoded on its way to the tensor cores, not into shared
//   memory (bitsandbytes 0.50), which would have to move 4 more bytes a weight. 128 n read x once for so many, 12 KB
//   from the L2 for 8192 weights at 64 m, which an H200 delivers in 440 cycles and multiplies in 413.
//   Rejected: 64 n, 20 KB, and warps that share out K, 365 instructions for 64 k of a warp at 64 m instead of 327, 271
//   instead of 247 at 32 m; 256 n by 8 warps, which hide latencies where 100 KB hold one block: on an RTX 4090 by
//   tiles.h's arithmetic 3 % less at 8192 x 28672, but 24 % more at 4096 x 4096, with twice the sums to add.
// Limits: 64 k of 64 m take a warp 64 mma's, 413 cycles of a quarter of an SM (sm_90, 1270 multiply-adds a cycle and
//   SM), and 327 instructions. A weight takes 2 bytes of shared memory for the table, 0.5 packed and 4 of x: at those
//   20 weights a cycle 129 of 128 bytes; sm_80: 16 weights, 104 bytes; sm_86, 89, 120: 8 weights.
// Time: 2 M N K flops; M = 512, 4096 x 4096 at 569 TFLOP/s (an H200): 30 us. With waves and latencies: tiles.h.
// Needs: bf16 or fp16, K % 64 == 0, all pointers aligned to 16 bytes.
//
// Shared memory (kTileM = kTileN = 128: 32 + 3 * 20 KB; the epilogue's tile of y overlays all of it):
//
//   | pair table 32 KB | stage 0                             | stage 1 | stage 2 |
//                      | W[kTileN, 32 bytes] | x[kTileM, 64] |
//
//   step        0             1             2             3            one iteration each, between two barriers
//   multiply    stage 0       stage 1       stage 2       stage 0
//   in flight   1, fetch 2    2, fetch 0    0, fetch 1    1, fetch 2   "fetch s": the copies that the step begins
//
// Stages 0 and 1 are fetched before step 0. The fetch of a step fills the stage that the step before it has read. Tiles
// of 32 and 64 m have a fourth stage.
#pragma once

#include "linear.cuh"
#include "split_sums.cuh"
#include "tile.cuh"
#include "tiles.h"

namespace nf4::cuda {

// A block's shape: warps along N and M, mma tiles of 8 m a warp, stages of 64 k, and the resident blocks for which
// registers are shared out.
struct LinearM32 {
  static constexpr int kWarpsN = 4, kWarpsM = 1, kTilesM = 4, kStages = 4, kBlocks = 3;
};
struct LinearM64 {
  static constexpr int kWarpsN = 4, kWarpsM = 1, kTilesM = 8, kStages = 4, kBlocks = 2;
};
struct LinearM128 {
  static constexpr int kWarpsN = 4, kWarpsM = 2, kTilesM = 8, kStages = 3, kBlocks = 1;
};

template <class Warps>
struct LinearShape : Warps {
  using Warps::kWarpsN, Warps::kWarpsM, Warps::kTilesM, Warps::kStages, Warps::kBlocks;
  static constexpr int kThreads = kWarpsN * kWarpsM * kWarp;
  static constexpr int kTileM = kWarpsM * 8 * kTilesM, kTileN = kWarpsN * kWarpTileN;
  static constexpr int kPackedBytes = kTileN * kBlockK / 2, kXBytes = kTileM * kBlockK * 2;
  static constexpr int kStageBytes = kPackedBytes + kXBytes;
  static constexpr int kPitch = kTileN + 4;  // floats a row of the epilogue's tile: lane 4g + t writes to bank 8t + g
  static constexpr int kSharedBytes = kPairTableBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= kSharedMost, "every architecture has so much");
  static_assert(kTileM * kPitch * 4 <= kSharedBytes, "the epilogue's tile fits where table and stages were");
};

template <class T, class S, class Work>
struct TiledLinear {
  static constexpr int kXVectors = kBlockK * 2 / kVectorBytes;
  const ProductArgs& args;
  const Work& work;
  Lane lane;
  int warp_n, warp_m;
  int64_t n_begin, m_begin;  // of the block's tile
  RowFetcher<S::kTileN, 2, Swizzle::kNone, S::kThreads> packed_fetcher;
  RowFetcher<S::kTileM, kXVectors, Swizzle::kXorRow, S::kThreads> x_fetcher;
  unsigned char* stages;

  NF4_DEVICE TiledLinear(const ProductArgs& args, const Work& work)
      : args(args),
        work(work),
        warp_n(int(threadIdx.x) / kWarp % S::kWarpsN),
        warp_m(int(threadIdx.x) / (kWarp * S::kWarpsN)),
        n_begin(int64_t(work.tile) * S::kTileN),
        m_begin(work.m_begin),
        packed_fetcher(work.weight.packed, n_begin, work.weight.N, work.weight.K / 2),
        x_fetcher(args.x, m_begin, work.m_end, work.weight.K * 2),
        stages(shared_memory<unsigned char>() + kPairTableBytes) {}

  // A stage: packed bytes [kTileN, 32], then x [kTileM, 64].
  NF4_DEVICE unsigned char* packed_tile(int stage) const { return stages + stage * S::kStageBytes; }
  NF4_DEVICE unsigned char* x_tile(int stage) const { return packed_tile(stage) + S::kPackedBytes; }

  NF4_DEVICE void fetch(int stage, int block) const {
    x_fetcher.fetch(x_tile(stage), uint32_t(block) * (kBlockK * 2));
    packed_fetcher.fetch(packed_tile(stage), uint32_t(block) * (kBlockK / 2));
  }

  template <class Scales>
  NF4_DEVICE void multiply(Sums<S::kTilesM>& sums, int stage, const Scales& scales, int block,
                           const typename Scales::Stored& stored, const uint32_t (&rows)[kSlots],
                           const PairTable& table, float factor) const {
    const unsigned char* packed = packed_tile(stage) + (warp_n * kWarpTileN + lane.g) * 32 + 8 * lane.t;
    uint2 words[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) words[slot] = *reinterpret_cast<const uint2*>(packed + 8 * slot * 32);
    const unsigned char* x = x_tile(stage) + (warp_m * S::kTilesM * 8 + lane.g) * kBlockK * 2;  // row g of 8 m
    const int vectors[2] = {swizzle<Swizzle::kXorRow, kXVectors>(2 * lane.t, lane.g),
                            swizzle<Swizzle::kXorRow, kXVectors>(2 * lane.t + 1, lane.g)};
    scales.template multiply<T, S::kTilesM>(sums, block, stored, rows, words, table, factor, [&](int m, int half) {
      return *reinterpret_cast<const uint4*>(x + m * 8 * kBlockK * 2 + kVectorBytes * vectors[half]);
    });
  }

  // The epilogue: adds the splits up or leaves them to reduce_splits, then stores y, four consecutive n a thread.
  NF4_DEVICE void finish(Sums<S::kTilesM>& sums) const {
    bool is_total = false;
    if constexpr (Work::kMayAddInLaunch)
      if (args.splits > 1 && args.arrivals >= 0) {
        const auto sum = [&](int i) -> float& { return sums[i / (S::kTilesM * 4)][i / 4 % S::kTilesM][i % 4]; };
        is_total = add_splits_in_launch<kTilesN * S::kTilesM * 4, S::kThreads>(args, int(work.split), sum);
        if (!is_total) return;
      }
    float* tile = shared_memory<float>();  // [kTileM, kPitch]
    sync_block();                          // stages and table have been read
#pragma unroll
    for (int i = 0; i < kTilesN; ++i)
#pragma unroll
      for (int tile_m = 0; tile_m < S::kTilesM; ++tile_m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int m = (warp_m * S::kTilesM + tile_m) * 8 + 2 * lane.t + j % 2;
          tile[m * S::kPitch + warp_n * kWarpTileN + 16 * i + lane.g + 8 * (j / 2)] = sums[i][tile_m][j];
        }
    sync_block();
    const Store<T> store =
        is_total ? Store<T>::of_totals(args, work.weight.N, work) : Store<T>(args, work.weight.N, work);
    for (int i = int(threadIdx.x); i < S::kTileM * S::kTileN / 4; i += S::kThreads) {
      const int m = i / (S::kTileN / 4), n = i % (S::kTileN / 4) * 4;
      const float* from = tile + m * S::kPitch + n;
      const float four[4] = {from[0], from[1], from[2], from[3]};
      if (m_begin + m < work.m_end) store.template run<4>(m_begin + m, n_begin + n, four);
    }
  }
};

// The work of a thread block.
template <class T, class S, class Scaled, class Work>
NF4_DEVICE void linear_tiled_block(const ProductArgs& args, const Work& work) {
  constexpr int kStages = S::kStages;
  const TiledLinear<T, S, Work> product(args, work);
  const int64_t warp_n_begin = product.n_begin + product.warp_n * kWarpTileN;
  uint32_t rows[kSlots];
  row_offsets(rows, work.weight, product.n_begin, warp_n_begin, product.lane);
  const RowScales<Scaled> scales(work.weight, product.n_begin, warp_n_begin, product.lane);
  const int blocks = int(work.weight.K / kBlockK);  // of 64 k, one a step
  const SplitRange steps(blocks, work.split, args.splits);
  const int begin = int(steps.begin), end = int(steps.end);
  const auto stored_of = [&](int step) { return scales.stored(min(step, blocks - 1), rows); };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) product.fetch(s, begin + s);
    copy_async_commit();
  }
  auto stored = stored_of(begin);
  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  const PairTable table(words, product.lane.index);

  Sums<S::kTilesM> sums = {};
  if (args.rank > 0 && work.is_first_split())
    add_lora_term<T, S::kTilesM>(sums, args, work, warp_n_begin, product.m_begin + product.warp_m * 8 * S::kTilesM,
                                 product.lane);
  int stage = 0, free = kStages - 1;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this stage has arrived for all threads, and all have read the stage before it
    if (step + kStages - 1 < end) product.fetch(free, step + kStages - 1);
    copy_async_commit();
    const auto now = stored;
    stored = stored_of(step + 1);
    product.multiply(sums, stage, scales, step, now, rows, table, factor);
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  product.finish(sums);
}

template <class Warps>
constexpr bool is_shape_of(const Tile& tile) {
  using S = LinearShape<Warps>;
  return tile.M == S::kTileM && tile.N == S::kTileN && tile.K == kBlockK && tile.warps * kWarp == S::kThreads &&
         tile.summing == 1 && tile.shared == S::kSharedBytes && tile.blocks == S::kBlocks;
}
static_assert(is_shape_of<LinearM32>(kLinearTiles[0]) && is_shape_of<LinearM64>(kLinearTiles[1]) &&
                  is_shape_of<LinearM128>(kLinearTiles[2]),
              "the shapes that tiles.h counts on");

}  // namespace nf4::cuda
