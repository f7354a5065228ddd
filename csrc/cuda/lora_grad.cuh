// LoRA's gradients, a block's share: sums of small[M, rank]^T @ wide[M, columns] over a range of rows, for 8 kRankTiles
// ranks by 64 columns. Read first: transposed_fragments.cuh (how a lane holds wide).
//
// Who: the block's 8 warps take turns at 16 m; their sums are added in order.
// Trick: wide, the only large operand, is read once (16 bytes a lane, four rows of 128 bytes a warp), a step ahead, and
//   goes straight to tensor cores: at rank 16 an H200 at memory speed would need 69 TFLOP/s, more than its fp32 FMAs
//   have. Which rank is which column of an mma is free: column g of tile i is rank kRankTiles g + i, so that a lane's
//   ranks of a row are one load where `rank` is a multiple of kRankTiles. small stays in the L1.
// Needs: bf16 or fp16, columns % 8 == 0, all pointers aligned to 16 bytes.
#pragma once

#include "product.cuh"
#include "transposed_fragments.cuh"

namespace nf4::cuda::lora_grad_block {

constexpr int kWarps = 8;
constexpr int kColumns = 64;
constexpr int kStep = 16;  // m of one mma
template <int kRankTiles>
constexpr int kBlocks = kRankTiles == 2 ? 2 : 1;  // resident, for which registers are shared out
template <int kRankTiles>
constexpr size_t kSharedBytes = size_t(kWarps) * 8 * kRankTiles * kColumns * 4;

template <class T, int kRankTiles>
struct Grad {
  static constexpr int kTileFloats = 8 * kRankTiles * kColumns;
  const LoraGradArgs& args;
  int64_t column_begin, r_begin;
  Lane lane;
  int warp;
  TransposedSums<kRankTiles> sums;

  NF4_DEVICE Grad(const LoraGradArgs& args, int64_t column_begin, int64_t r_begin)
      : args(args), column_begin(column_begin), r_begin(r_begin), warp(int(threadIdx.x) / kWarp) {}

  // A step's operands of a lane: rows m to m + 3 of its 8 columns of wide and of its kRankTiles ranks of small.
  struct Step {
    uint4 wide[4];
    uint32_t small[4][kRankTiles / 2];
  };
  template <bool kWhole>
  NF4_DEVICE void load(Step& step, int64_t m, int64_t m_end) const {
    const int64_t column = column_begin + 8 * lane.g, r = r_begin + kRankTiles * lane.g;
    load_rows(step.wide, static_cast<const T*>(args.wide) + m * args.columns + column, m, m_end, args.columns,
              column < args.columns);
    const T* small = static_cast<const T*>(args.small) + m * args.rank + r;
#pragma unroll
    for (int i = 0; i < 4; ++i, small += args.rank) {
      if constexpr (kWhole) {
        using Ranks = std::conditional_t<kRankTiles == 4, uint2, uint32_t>;
        Ranks ranks{};
        if (m + i < m_end && r < args.rank) ranks = load_cached(reinterpret_cast<const Ranks*>(small));
        if constexpr (kRankTiles == 4) {
          step.small[i][0] = ranks.x;
          step.small[i][1] = ranks.y;
        } else {
          step.small[i][0] = ranks;
        }
      } else {
#pragma unroll
        for (int j = 0; j < kRankTiles; j += 2) {
          const auto bits = [&](int rank) {
            return m + i < m_end && r + rank < args.rank ? small[rank].bits : uint32_t{0};
          };
          step.small[i][j / 2] = bits(j) | bits(j + 1) << 16;
        }
      }
    }
  }
  NF4_DEVICE void multiply(const Step& step) {
    uint32_t a[kColumnTiles][4];
    transpose(a, step.wide);
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      const auto& small = step.small;
      const int pair = tile / 2;
      const uint32_t selector = tile % 2 == 0 ? 0x5410 : 0x7632;
      const uint32_t b0 = permute_bytes(small[0][pair], small[1][pair], selector);
      const uint32_t b1 = permute_bytes(small[2][pair], small[3][pair], selector);
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) mma_16x8x16<T>(sums[i][tile], a[i], b0, b1);
    }
  }

  // sums = small^T @ wide of rows [m_begin, m_end).
  NF4_DEVICE void sum(int64_t m_begin, int64_t m_end) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i)
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][tile][j] = 0;
    if (args.rank % kRankTiles == 0 && reinterpret_cast<uintptr_t>(args.small) % (2 * kRankTiles) == 0)
      sum_steps<true>(m_begin, m_end);
    else
      sum_steps<false>(m_begin, m_end);
  }
  template <bool kWhole>
  NF4_DEVICE void sum_steps(int64_t m_begin, int64_t m_end) {
    int64_t m = m_begin + warp * kStep;
    Step next;
    load<kWhole>(next, m + 4 * lane.t, m_end);
#pragma unroll 1
    for (; m < m_end; m += kWarps * kStep) {
      const Step now = next;
      load<kWhole>(next, m + kWarps * kStep + 4 * lane.t, m_end);
      multiply(now);
    }
  }

  // Writes the warp's sums to shared memory [kWarps, 8 kRankTiles, kColumns], or adds them to those of an earlier run.
  NF4_DEVICE void keep(bool is_first) {
    float* scratch = shared_memory<float>();
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float values[8];
        eight_columns<kRankTiles>(values, sums, tile, odd);
        float* to = scratch + warp * kTileFloats + (kRankTiles * (2 * lane.t + odd) + tile) * kColumns + 8 * lane.g;
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = is_first ? values[i] : to[i] + values[i];
      }
  }

  // Calls f(rank, column, i) for the thread's share of the tile's elements.
  template <class F>
  NF4_DEVICE void for_each_own(F&& f) const {
    for (int i = int(threadIdx.x); i < kTileFloats; i += kWarps * kWarp) {
      const int64_t r = r_begin + i / kColumns, column = column_begin + i % kColumns;
      if (r < args.rank && column < args.columns) f(r, column, i);
    }
  }

  // Calls store(rank, column, total) for every element, with the warps' sums added in order.
  template <class F>
  NF4_DEVICE void finish(F&& store) const {
    const float* scratch = shared_memory<float>();
    sync_block();
    for_each_own([&](int64_t r, int64_t column, int i) {
      float total = 0;
      for (int from = 0; from < kWarps; ++from) total += scratch[from * kTileFloats + i];
      store(r, column, total);
    });
  }
};

// Stores element (rank r, column) of the gradient at out + `begin`, scaled and rounded to out_dtype.
NF4_DEVICE void store_grad(const LoraGradArgs& args, int64_t begin, int64_t r, int64_t column, float value) {
  const int64_t to = begin + (args.transposed ? column * args.rank + r : r * args.columns + column);
  value *= args.scaling;
  switch (args.out_dtype) {
    case Dtype::kFloat32: static_cast<float*>(args.out)[to] = value; break;
    case Dtype::kBFloat16: static_cast<BFloat16*>(args.out)[to] = from_float<BFloat16>(value); break;
    default: static_cast<Float16*>(args.out)[to] = from_float<Float16>(value);
  }
}

}  // namespace nf4::cuda::lora_grad_block
