// LoRA's gradients, a block's share: sums of small[M, rank]^T @ wide[M, columns] over a range of rows, for 8 kRankTiles
// ranks by 64 columns. Read first: transposed_fragments.cuh (how a lane holds wide).
//
// Who: the block's 8 warps take turns at 16 m; their sums are added in order.
// Trick: wide, the only large operand, is read once (16 bytes a lane, four rows of 128 bytes a warp) and goes straight
//   to tensor cores: at rank 16 an H200 at memory speed would need 69 TFLOP/s, more than its fp32 FMAs have. small is
//   read by single elements; it stays in the L1.
// Needs: bf16 or fp16, columns % 8 == 0, all pointers aligned to 16 bytes.
#pragma once

#include "product.cuh"
#include "transposed_fragments.cuh"

namespace nf4::cuda::lora_grad_block {

constexpr int kWarps = 8;
constexpr int kColumns = 64;
constexpr int kStep = 16;  // m of one mma
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

  // sums = small^T @ wide of rows [m_begin, m_end).
  NF4_DEVICE void sum(int64_t m_begin, int64_t m_end) {
    const int64_t column = column_begin + 8 * lane.g;
    const T* small = static_cast<const T*>(args.small);
    const T* wide = static_cast<const T*>(args.wide) + column;
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i)
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][tile][j] = 0;
    for (int64_t m_step = m_begin + warp * kStep; m_step < m_end; m_step += kWarps * kStep) {
      const int64_t m = m_step + 4 * lane.t;
      uint32_t a[kColumnTiles][4];
      load_transposed(a, wide + m * args.columns, m, m_end, args.columns, column < args.columns);
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        const int64_t r = r_begin + 8 * tile + lane.g;
        uint32_t ranks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ranks[i] = m + i < m_end && r < args.rank ? small[(m + i) * args.rank + r].bits : 0u;
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i)
          mma_16x8x16<T>(sums[i][tile], a[i], ranks[0] | ranks[1] << 16, ranks[2] | ranks[3] << 16);
      }
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
        float* to = scratch + warp * kTileFloats + (8 * tile + 2 * lane.t + odd) * kColumns + 8 * lane.g;
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = is_first ? values[i] : to[i] + values[i];
      }
  }

  // Calls store(rank, column, total) for every element, with the warps' sums added in order.
  template <class F>
  NF4_DEVICE void finish(F&& store) const {
    const float* scratch = shared_memory<float>();
    sync_block();
    for (int i = int(threadIdx.x); i < kTileFloats; i += kWarps * kWarp) {
      const int64_t r = r_begin + i / kColumns, column = column_begin + i % kColumns;
      if (r >= args.rank || column >= args.columns) continue;
      float total = 0;
      for (int from = 0; from < kWarps; ++from) total += scratch[from * kTileFloats + i];
      store(r, column, total);
    }
  }
};

}  // namespace nf4::cuda::lora_grad_block
