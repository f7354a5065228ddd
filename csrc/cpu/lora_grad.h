// lora_grad: out[j, c] = scaling * sum_m small[m, j] * wide[m, c], the gradient of a LoRA factor: small is P or Q [M, r],
// wide is dy or x [M, C].
//
// Work split   column tiles of 2L; the caller splits them over threads. A tile's sum is in the order of m, whoever does it.
// Inner loop   kRun rows of a wide tile become fp32 once (bf16: pairs of rows, for vdpbf16ps), then low_rank.h's 4 x 2
//              sums, ranks for its rows and m for its ranks. Up to kRanksAtOnce ranks share one pass over wide.
// Rejected     torch's matmul: 551 (dA) and 631 us (dB) against 470 and 496 at M = 512, 40 against 29 at M = 16 in a loop
//              of its own, and there 148 and 75 against 56 and 61 within a training step (bf16, r = 16, C = 4096, one Zen 4
//              core). It also rounds to wide's dtype before an fp32 adapter gets the result.
// Flops        2*M*r*C, at the rate of bf16 products or of fp32; reads wide once.
// Prefetch     the rows of the next run: they lie C elements apart, which the hardware does not follow.
#pragma once

#include "low_rank.h"

namespace nf4 {
namespace {

constexpr int kGradCols = 2 * Isa::L;
constexpr int kRun = 64;                    // rows summed in registers
constexpr int64_t kBlockRows = 512 * kRun;  // runs summed in one tile: at most 512 terms a running sum
constexpr int kRanksAtOnce = 64;

// A row of a wide tile in fp32, zero past `cols`.
template <class T>
struct GradFp32 : Fp32Dot {
  static void load(const T* row, const T*, int64_t cols, float* out) {
    if (cols == kGradCols) {
      Isa::store(out, Isa::load(row));
      Isa::store(out + Isa::L, Isa::load(row + Isa::L));
    } else {
      for (int64_t c = 0; c < kGradCols; ++c) out[c] = c < cols ? to_float(row[c]) : 0.f;
    }
  }
};

// sums [ranks][kGradCols] of rows [begin, end). Dot::load takes kStep rows, the second null past the end.
template <class Dot, class T>
void sum_grad_tile(const LoraGradArgs& args, int64_t begin, int64_t end, int64_t rank, int ranks, int64_t col,
                   int64_t cols, float* sums) {
  using Element = typename Dot::Element;
  alignas(64) Element run[kRun * kGradCols];
  std::memset(sums, 0, size_t(ranks) * kGradCols * sizeof(float));
  const T* wide = static_cast<const T*>(args.wide) + col;
  for (int64_t m = begin; m < end; m += kRun) {
    const int rows = end - m < kRun ? int(end - m) : kRun;
    for (int i = 0; i < rows; i += Dot::kStep) {
      const T *row = wide + (m + i) * args.columns, *next = i + 1 < rows ? row + args.columns : nullptr;
      for (int s = 0; s < Dot::kStep && m + i + s + kRun < end; ++s)
        __builtin_prefetch(row + (kRun + s) * args.columns);
      Dot::load(row, next, cols, run + i * kGradCols);
    }
    const Element* small = static_cast<const Element*>(args.small) + rank * args.small_stride + m;
    int j = 0;
    for (; j + kLowRankRows <= ranks; j += kLowRankRows)
      add_ranks<Dot, kLowRankRows, kGradCols>(small + j * args.small_stride, args.small_stride, run, rows,
                                              sums + j * kGradCols);
    for (; j < ranks; ++j)
      add_ranks<Dot, 1, kGradCols>(small + j * args.small_stride, args.small_stride, run, rows, sums + j * kGradCols);
  }
}

template <class T>
void store_scaled(T* out, const float* sums, int64_t count, float scaling) {
  int64_t i = 0;
  for (; i + Isa::L <= count; i += Isa::L) Isa::store(out + i, Isa::mul(Isa::load(sums + i), Isa::set1(scaling)));
  for (; i < count; ++i) out[i] = from_float<T>(sums[i] * scaling);
}

// Dot<T> for wide of T.
template <template <class> class Dot>
void lora_grad_tiles(const LoraGradArgs& args, int64_t tile_begin, int64_t tile_end) {
  float sums[kRanksAtOnce * kGradCols], block[kRanksAtOnce * kGradCols];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t col = tile * kGradCols;
    const int64_t cols = args.columns - col < kGradCols ? args.columns - col : kGradCols;
    for (int64_t rank = 0; rank < args.rank; rank += kRanksAtOnce) {
      const int ranks = args.rank - rank < kRanksAtOnce ? int(args.rank - rank) : kRanksAtOnce;
      with_type(args.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t begin = 0; begin == 0 || begin < args.rows; begin += kBlockRows) {
          const int64_t end = args.rows - begin < kBlockRows ? args.rows : begin + kBlockRows;
          sum_grad_tile<Dot<T>, T>(args, begin, end, rank, ranks, col, cols, begin == 0 ? sums : block);
          for (int i = 0; begin > 0 && i < ranks * kGradCols; ++i) sums[i] += block[i];
        }
      });
      with_type(args.out_dtype, [&](auto t) {
        auto* out = static_cast<decltype(t)*>(args.out);
        if (args.transposed) {
          // All of it first: a vector load right after the scalar stores it covers waits for them, 40 cycles a column.
          for (int64_t c = 0; c < cols; ++c)
            for (int j = 0; j < ranks; ++j) block[c * ranks + j] = sums[j * kGradCols + c];
          for (int64_t c = 0; c < cols; ++c)
            store_scaled(out + (col + c) * args.rank + rank, block + c * ranks, ranks, args.scaling);
        } else {
          for (int64_t j = 0; j < ranks; ++j)
            store_scaled(out + (rank + j) * args.columns + col, sums + j * kGradCols, cols, args.scaling);
        }
      });
    }
  }
}

}  // namespace
}  // namespace nf4
