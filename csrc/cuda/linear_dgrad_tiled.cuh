// linear_dgrad: dX[M, K] = dY[M, N] @ W[N, K] on tensor cores, from the same packed bytes, although the contraction
// runs over the rows of W. Read first: transposed_fragments.cuh (the row permutation), pair_table.cuh, tile.cuh.
//
// Who: a block owns kTileM x kTileK of dX and one of `splits` parts of N. Its warps are kWarpsK x kWarpsM x kWarpsN;
//   the kWarpsN share out the groups of 32 n of a stage. A warp owns 64 k by 8 kTilesM m. The last block of a tile adds
//   the splits up (split_sums.cuh).
// Trick: W^T is mma's A operand. A lane takes one word, 8 k, of each of its 4 rows of W; the table gives pairs along k,
//   and two byte permutes make pairs along n of two of them. The scale belongs to n, over which the product sums, so it
//   multiplies an operand, as two numbers in T and rounded once in all: {s_n, s_n+1} times the pair. With the level
//   that is two roundings, their error together 1.6 times dense bf16's at most. Rejected: a scale rounded to T, whose
//   error adds up where many blocks have one scale (weights clamped at 2 sigma, dY of mean one sigma: 2.2 % of the
//   output, dense 0.3 %); scaling dY in fp32, 2.5 instructions a weight at 64 m.
// Limits: 32 n of 64 k by 64 m take a warp 64 mma's, 413 cycles of a quarter of an SM (sm_90), and 426 instructions:
//   of a weight's 6.7, 0.5 are table loads, 1 forms their addresses, 0.5 transposes pairs, 1 is for the scales. With
//   scales of 16 or 32 k (ScaledLevels), of which each lane decodes 4 instead of one, 3 % more at 64 and 128 m.
// Time: 2 M N K flops; M = 512, 4096 x 4096 at 588 TFLOP/s (an H200's mma.sync): 29 us.
// Needs: bf16 or fp16, K % 64 == 0, N % 8 == 0, all pointers aligned to 16 bytes.
//
// Shared memory (kTileM = 128, kTileN = 32, kTileK = 256: 32 + 4 * 12.25 KB; the epilogue's sums overlay all of it):
//
//   | pair table 32 KB | stage 0                                                     | stage 1 | stage 2 | stage 3 |
//                      | W[kTileN, kTileK / 2 bytes], padded | dY[kTileM, kTileN]    |
//
//   step        0                1                2                3              one iteration each
//   multiply    stage 0          stage 1          stage 2          stage 3
//   in flight   1, 2, fetch 3    2, 3, fetch 0    3, 0, fetch 1    0, 1, fetch 2
//
// Stages 0 to 2 are fetched before step 0. The fetch of a step fills the stage that the step before it has read. The tile
// of 64 m has three stages, so that two blocks fit into the 164 KB of sm_80.
//
// Banks of W: 32 bytes of padding after every 4 rows make row 4t + i begin 8t banks behind row i. Lane 4g + t reads
//   word
// g of it, at bank 8t + g: all 32 differ.
#pragma once

#include <type_traits>

#include "pair_table.cuh"
#include "split_sums.cuh"
#include "tile.cuh"
#include "tiles.h"
#include "transposed_fragments.cuh"

namespace nf4::cuda {

// A block's shape: warps along K, M and N, mma tiles of 8 m a warp, stages of kTileN n, and the resident blocks for which
// registers are shared out.
struct DgradM16 {
  static constexpr int kWarpsK = 2, kWarpsM = 1, kWarpsN = 4, kTilesM = 2, kTileN = 128, kStages = 4, kBlocks = 2;
};
struct DgradM32 {
  static constexpr int kWarpsK = 2, kWarpsM = 1, kWarpsN = 2, kTilesM = 4, kTileN = 64, kStages = 4, kBlocks = 3;
};
struct DgradM64 {
  static constexpr int kWarpsK = 2, kWarpsM = 1, kWarpsN = 2, kTilesM = 8, kTileN = 64, kStages = 3, kBlocks = 2;
};
struct DgradM128 {
  static constexpr int kWarpsK = 4, kWarpsM = 2, kWarpsN = 1, kTilesM = 8, kTileN = 32, kStages = 4, kBlocks = 1;
};

template <class Warps>
struct DgradShape : Warps {
  using Warps::kWarpsK, Warps::kWarpsM, Warps::kWarpsN, Warps::kTilesM, Warps::kTileN, Warps::kStages, Warps::kBlocks;
  static constexpr int kGroupN = 32;  // n a warp multiplies at a time: two k-steps of mma
  static constexpr int kThreads = kWarpsK * kWarpsM * kWarpsN * kWarp;
  static constexpr int kTileM = kWarpsM * 8 * kTilesM, kTileK = kWarpsK * kBlockK;
  static constexpr int kPackedPitch = kTileK / 2, kPackedBytes = kTileN * kPackedPitch + kTileN / 4 * 32;
  static constexpr int kDyBytes = kTileM * kTileN * 2, kStageBytes = kPackedBytes + kDyBytes;
  static constexpr int kSharedBytes = kPairTableBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= kSharedMost, "every architecture has so much");
  static_assert(kTileN % (kGroupN * kWarpsN) == 0, "a stage is whole groups for every warp");
  static_assert(kPackedPitch % 16 == 0 && kPackedPitch * 4 % 128 == 0, "rows 4 apart begin at the same bank, unpadded");
  static_assert(kTileM * kTileK * 4 <= kSharedBytes || kWarpsN == 1, "the sums of the kWarpsN overlay all of it");
};

// In bf16 a scale of all 64 k multiplies dY, whose rounding error is then another one at every (m, n). In fp16 it
// multiplies the levels, because dY times a scale could leave fp16's range where dY times W does not; and so do scales
// of fewer k, because all k share dY.
template <class T, class Scaled>
constexpr bool kScalesDy = std::is_same_v<T, BFloat16> && kScalesSums<Scaled>;

// The scales of a group's 32 n, each lane's as pairs along n: for its n = 16 step + 4t + 0..3, pairs 2 step and 2 step +
// 1. They are times the table's factor, and zeros past N and K. Two forms with the same members.
template <class T>
using GroupScales = ScalePair<T>[4];
template <class Scaled>
struct DgradScales;

// Each lane decodes the scale of one row, n + lane, over the warp's 64 k.
template <>
struct DgradScales<ScaledSums> {
  using Stored = StoredScales<1>;
  const Weight& w;
  const Lane& lane;
  uint32_t first;  // the warp's block of 64 k in the lane's row of the first 32
  int N;           // rows from the lane's on; 0 past K
  NF4_DEVICE DgradScales(const Weight& w, const Lane& lane, int64_t k_begin)
      : w(w),
        lane(lane),
        first(uint32_t(lane.index * (w.K / kBlockK) + k_begin / kBlockK)),
        N(k_begin < w.K ? int(w.N) - lane.index : 0) {}

  NF4_DEVICE bool is_inside(int n) const { return n < N; }
  NF4_DEVICE uint32_t index(int n) const {
    return (first + uint32_t(n) * uint32_t(w.K / kBlockK)) >> (w.block_shift - 6);
  }
  NF4_DEVICE Stored stored(int n) const {
    if (!is_inside(n)) return {};
    return load_scales<1>(w, scales_in<ScaledSums>(w), [&](int) { return index(n); });
  }

  template <class T>
  NF4_DEVICE void decode(GroupScales<T>& scales, int n, const Stored& stored, float factor) const {
    float own[1] = {};
    if (is_inside(n))
      decode_scales(own, w, scales_in<ScaledSums>(w), stored, offset_of(w), [&](int) { return index(n); });
    own[0] *= factor;
    const ScalePair<T> pair(own[0], shuffle_xor(own[0], 1));  // only even lanes hold {s_n, s_n+1} in this order
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 16 * (i / 2) + 4 * lane.t + 2 * (i % 2);
      scales[i].high = shuffle(pair.high, from);
      scales[i].low = shuffle(pair.low, from);
    }
  }
};

// The lane's 8 k are in the block of 16 k g / 2, of which the lanes of two g need the same 8 rows. An even g decodes those
// of the first step, an odd g those of the second.
template <>
struct DgradScales<ScaledLevels> {
  static constexpr int kOwn = 4;
  using Stored = StoredScales<kOwn>;
  const Weight& w;
  const Lane& lane;
  uint32_t first;  // the lane's block of 16 k in row own_n of W
  int own_n, N;
  NF4_DEVICE DgradScales(const Weight& w, const Lane& lane, int64_t k_begin)
      : w(w), lane(lane), own_n(16 * (lane.g % 2) + 4 * lane.t), N(k_begin < w.K ? int(w.N) : 0) {
    first = uint32_t(own_n * (w.K / 16) + k_begin / 16 + lane.g / 2);
  }

  NF4_DEVICE bool is_inside(int n) const { return n + own_n < N; }  // N is a multiple of 8, and so all four are
  NF4_DEVICE uint32_t index(int n, int i) const {
    return (first + uint32_t(n + i) * uint32_t(w.K / 16)) >> (w.block_shift - 4);
  }
  NF4_DEVICE Stored stored(int n) const {
    if (!is_inside(n)) return {};
    return load_scales<kOwn>(w, w.scales, [&](int i) { return index(n, i); });
  }

  template <class T>
  NF4_DEVICE void decode(GroupScales<T>& scales, int n, const Stored& stored, float factor) const {
    float own[kOwn] = {};
    if (is_inside(n)) decode_scales(own, w, w.scales, stored, offset_of(w), [&](int i) { return index(n, i); });
    const ScalePair<T> pairs[2] = {{own[0] * factor, own[1] * factor}, {own[2] * factor, own[3] * factor}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * (lane.g / 2 * 2 + i / 2) + lane.t;
      scales[i].high = shuffle(pairs[i % 2].high, from);
      scales[i].low = shuffle(pairs[i % 2].low, from);
    }
  }
};

template <class T, class S, class Scaled, class Work>
struct TiledDgrad {
  static constexpr int kGroupN = S::kGroupN;
  static constexpr int kDyVectors = S::kTileN * 2 / kVectorBytes;
  const ProductArgs& args;
  const Work& work;
  const Weight& w;
  Lane lane;
  int warp_k, warp_m, warp_n;
  int64_t k_begin, m_begin;  // of the block's tile
  int N;
  CopyShare<S::kTileN, S::kPackedPitch / kVectorBytes, S::kThreads> packed_share;
  const uint8_t* packed;  // this thread's vector of row 0
  RowFetcher<S::kTileM, kDyVectors, Swizzle::kXorRowPairs, S::kThreads> dy_fetcher;
  unsigned char* stages;

  NF4_DEVICE TiledDgrad(const ProductArgs& args, const Work& work)
      : args(args),
        work(work),
        w(work.weight),
        warp_k(int(threadIdx.x) / kWarp % S::kWarpsK),
        warp_m(int(threadIdx.x) / (kWarp * S::kWarpsK) % S::kWarpsM),
        warp_n(int(threadIdx.x) / (kWarp * S::kWarpsK * S::kWarpsM)),
        k_begin(int64_t(work.tile) * S::kTileK),
        m_begin(work.m_begin),
        N(int(w.N)),
        packed(w.packed + smaller(k_begin + 32 * packed_share.vector, w.K - 32) / 2),
        dy_fetcher(args.x, m_begin, work.m_end, w.N * 2),
        stages(shared_memory<unsigned char>() + kPairTableBytes) {}

  NF4_DEVICE int64_t warp_k_begin() const { return k_begin + warp_k * kBlockK; }
  NF4_DEVICE int m_in_tile(int m) const { return (warp_m * S::kTilesM + m) * 8; }

  // A stage: padded packed rows of W [kTileN, kTileK / 2 bytes], then dY [kTileM, kTileN].
  NF4_DEVICE unsigned char* packed_row(int stage, int n) const {
    return stages + stage * S::kStageBytes + n * S::kPackedPitch + n / 4 * 32;
  }
  NF4_DEVICE unsigned char* dy_tile(int stage) const { return stages + stage * S::kStageBytes + S::kPackedBytes; }

  // Copies rows [n, n + kTileN) of W and of dY^T. Past N, dY's are zeros; W repeats its last row there, and its last
  // vector past K.
  NF4_DEVICE void fetch(int stage, int n) const {
    dy_fetcher.fetch(dy_tile(stage), uint32_t(n) * 2, n + 8 * dy_fetcher.vector < N);
    using Share = decltype(packed_share);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const int row = packed_share.row + i * Share::kRowStep;
      copy_async_16(packed_row(stage, row) + kVectorBytes * packed_share.vector,
                    packed + min(n + row, N - 1) * (w.K / 2));
    }
  }

  // sums += W[32 n, 64 k]^T @ dY^T of the stage's group `group`.
  NF4_DEVICE void multiply(TransposedSums<S::kTilesM>& sums, int stage, int group, const GroupScales<T>& scales,
                           const PairTable& table) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // 4 n a lane
      uint32_t pairs[kColumnTiles][4];      // along k, of n = 16 step + 4t + 0..3
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned char* row = packed_row(stage, group * kGroupN + 16 * step + 4 * lane.t + i);
        const uint32_t word = *reinterpret_cast<const uint32_t*>(row + warp_k * kBlockK / 2 + 4 * lane.g);
        pairs[0][i] = table.pair<0>(word);
        pairs[1][i] = table.pair<1>(word);
        pairs[2][i] = table.pair<2>(word);
        pairs[3][i] = table.pair<3>(word);
      }
      uint32_t a[kColumnTiles][4];
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        transpose(a[tile], pairs[tile]);
        if constexpr (!kScalesDy<T, Scaled>)
#pragma unroll
          for (int i = 0; i < 4; ++i) a[tile][i] = scales[2 * step + i / 2].times(a[tile][i]);
      }
      const int vector = (group * kGroupN + 16 * step + 4 * lane.t) / 8;
      const unsigned char* dys = dy_tile(stage) + (m_in_tile(0) + lane.g) * S::kTileN * 2 +
                                 kVectorBytes * swizzle<Swizzle::kXorRowPairs, kDyVectors>(vector, lane.g) +
                                 8 * (lane.t % 2);
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        uint2 dy = *reinterpret_cast<const uint2*>(dys + m * 8 * S::kTileN * 2);
        if constexpr (kScalesDy<T, Scaled>)
          dy = make_uint2(scales[2 * step].times(dy.x), scales[2 * step + 1].times(dy.y));
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) mma_16x8x16<T>(sums[tile][m], a[tile], dy.x, dy.y);
      }
    }
  }

  // sums += A[rank, 64 k]^T @ Q^T: A in place of W and Q in place of dY. The loads of a k-step are all in flight before
  // its first product. Rows past M repeat the last one: their results are not stored.
  template <bool kFours>
  NF4_DEVICE void multiply_lora(TransposedSums<S::kTilesM>& sums, const T* A, const T* Q) const {
    constexpr int kEach = kLaneRanks<kFours>;
    const int rank = int(args.rank), last_m = int(smaller(args.M - m_begin, S::kTileM)) - 1;
#pragma unroll 1
    for (int r = kEach * lane.t; r - kEach * lane.t < rank; r += 4 * kEach) {
      uint32_t a[kColumnTiles][4];
      load_transposed(a, A + r * w.K, r, min(rank, r + kEach), w.K, warp_k_begin() < w.K);
      uint2 q[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        const uint32_t row = uint32_t(min(m_in_tile(m) + lane.g, last_m)) * uint32_t(rank);
        q[m] = load_ranks<kFours>(Q + row, r, rank);
      }
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) mma_16x8x16<T>(sums[tile][m], a[tile], q[m].x, q[m].y);
    }
  }

  // The LoRA term, sums = scaling * A[rank, 64 k]^T @ Q^T.
  NF4_DEVICE void begin_with_lora_term(TransposedSums<S::kTilesM>& sums) const {
    const T* A = work.template own<T>(args.lora_factor, args.rank * w.K) + warp_k_begin() + 8 * lane.g;
    const T* Q = static_cast<const T*>(args.lora_inner) + m_begin * args.rank;
    if (has_fours(Q, args.rank))
      multiply_lora<true>(sums, A, Q);
    else
      multiply_lora<false>(sums, A, Q);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][m][i] *= args.scaling;
  }

  // The epilogue: the first of the kWarpsN adds the others' sums in order, adds the splits up or leaves them to
  // reduce_splits, and stores dX.
  NF4_DEVICE void finish(TransposedSums<S::kTilesM>& sums) const {
    constexpr int kValues = kColumnTiles * S::kTilesM * 4, kOwners = S::kWarpsK * S::kWarpsM * kWarp;
    float* others = shared_memory<float>() + int(threadIdx.x) % kOwners;  // [kValues, kOwners]
    const auto sum = [&](int i) -> float& { return sums[i / (S::kTilesM * 4)][i / 4 % S::kTilesM][i % 4]; };
    for (int n = 1; n < S::kWarpsN; ++n) {
      sync_block();  // stages and table have been read, or the first warps have read the sums before
      if (warp_n == n)
        for (int i = 0; i < kValues; ++i) others[i * kOwners] = sum(i);
      sync_block();
      if (warp_n == 0)
        for (int i = 0; i < kValues; ++i) sum(i) += others[i * kOwners];
    }
    bool is_total = false;
    if constexpr (Work::kMayAddInLaunch)
      if (args.splits > 1 && args.arrivals >= 0) {
        is_total = add_splits_in_launch<kValues, kOwners>(args, int(work.split), sum);
        if (!is_total) return;
      }
    if (warp_n != 0) return;
    const Store<T> store = is_total ? Store<T>::of_totals(args, w.K, work) : Store<T>(args, w.K, work);
#pragma unroll
    for (int tile_m = 0; tile_m < S::kTilesM; ++tile_m)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t m = m_begin + m_in_tile(tile_m) + 2 * lane.t + odd;
        float values[8];
        eight_columns<S::kTilesM>(values, sums, tile_m, odd);
        if (m < work.m_end) store.template run<8>(m, warp_k_begin() + 8 * lane.g, values);
      }
  }
};

// The work of a thread block.
template <class T, class S, class Scaled, class Work>
NF4_DEVICE void linear_dgrad_tiled_block(const ProductArgs& args, const Work& work) {
  constexpr int kStages = S::kStages;
  const TiledDgrad<T, S, Scaled, Work> product(args, work);
  const DgradScales<Scaled> row_scales(work.weight, product.lane, product.warp_k_begin());
  const SplitRange steps(ceil_div(work.weight.N, S::kTileN), work.split, args.splits);
  const int begin = int(steps.begin), end = int(steps.end);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) product.fetch(s, (begin + s) * S::kTileN);
    copy_async_commit();
  }
  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  const PairTable table(words, product.lane.index);

  TransposedSums<S::kTilesM> sums = {};
  if (args.rank > 0 && work.is_first_split() && product.warp_n == 0) product.begin_with_lora_term(sums);
  // This warp's groups of 32 n in a stage; their scales are loaded one group ahead.
  constexpr int kGroups = S::kTileN / (S::kGroupN * S::kWarpsN);
  const auto group_begin = [&](int step, int i) {
    return step * S::kTileN + (i * S::kWarpsN + product.warp_n) * S::kGroupN;
  };
  auto stored = row_scales.stored(group_begin(begin, 0));
  int stage = 0, free = kStages - 1;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this stage has arrived for all threads, and all have read the stage before it
    if (step + kStages - 1 < end) product.fetch(free, (step + kStages - 1) * S::kTileN);
    copy_async_commit();
#pragma unroll 1
    for (int i = 0; i < kGroups; ++i) {
      GroupScales<T> scales;
      row_scales.decode(scales, group_begin(step, i), stored, factor);
      stored = row_scales.stored(i + 1 < kGroups ? group_begin(step, i + 1) : group_begin(step + 1, 0));
      product.multiply(sums, stage, i * S::kWarpsN + product.warp_n, scales, table);
    }
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  product.finish(sums);
}

template <class Warps>
constexpr bool is_dgrad_shape_of(const Tile& tile) {
  using S = DgradShape<Warps>;
  return tile.M == S::kTileM && tile.N == S::kTileN && tile.K == S::kTileK && tile.warps * kWarp == S::kThreads &&
         tile.summing == S::kWarpsN && tile.shared == S::kSharedBytes && tile.blocks == S::kBlocks;
}
static_assert(is_dgrad_shape_of<DgradM16>(kDgradTiles[0]) && is_dgrad_shape_of<DgradM32>(kDgradTiles[1]) &&
                  is_dgrad_shape_of<DgradM64>(kDgradTiles[2]) && is_dgrad_shape_of<DgradM128>(kDgradTiles[3]),
              "the shapes that tiles.h counts on");

}  // namespace nf4::cuda
