// LoRA's term, added to fp32 sums before they are rounded: sums[m, c] += sum_j P[m, j] * factor(c, j), P scaled already.
//
//   linear        P = x A^T [M, r], factor(n, j) = B[n, j]        linear_dgrad   P = dy B [M, r], factor(k, j) = A[j, k]
//
// Who calls    the finishing stage of each product: add_low_rank for a tile of sums, store_column for a column.
// The trick    kRanks columns of the factor become fp32 vectors in the tile's own column order, once for all rows; then
//              4 rows at a time, P broadcast from memory. 0.7 % of linear at M = 16 and 64, 0.8 % at 512 (r = 16,
//              4096x4096, one Zen 4 core); a second pass over y (torch's addmm_) took 4.5, 2.8 and 1.5 %, and rounded
//              twice.
// Flops        2*M*columns*r: r / K of the product's, but at fp32's rate.
// Needs        P in fp32 (a caller's job: it is M*r elements); sums in L2, as all of them are read and written again.
#pragma once

#include "kernels.h"

namespace nf4 {
namespace {

constexpr int kRanks = 16;       // summed in registers, before they are added to the tile
constexpr int kLowRankRows = 4;  // rows at once: 4 x 2 sums cover the latency of an FMA

// B [N, rank], columns in order.
struct LoraB {
  template <int COLS, class T>
  static void pack(const T* b, const GemmArgs& args, int64_t n, int64_t cols, int64_t rank, int ranks, float* packed) {
    for (int64_t c = 0; c < COLS; ++c) {
      const T* row = b + (n + (c < cols ? c : cols - 1)) * args.rank + rank;
      float values[kRanks + Isa::L];
      int j = 0;
      for (; j + Isa::L <= ranks; j += Isa::L) Isa::store(values + j, Isa::load(row + j));
      for (; j < ranks; ++j) values[j] = to_float(row[j]);
      for (j = 0; j < ranks; ++j) packed[j * COLS + c] = values[j];
    }
  }
};

// A [rank, K], columns as a tile of linear_dgrad holds them: vector v has every V-th, from Order::first_column(v) on.
template <class Order>
struct LoraA {
  template <int COLS, class T>
  static void pack(const T* a, const GemmArgs& args, int64_t k, int64_t cols, int64_t rank, int ranks, float* packed) {
    for (int j = 0; j < ranks; ++j, packed += COLS) {
      const T* row = a + (rank + j) * args.weight.K + k;
      float values[COLS];
      int64_t c = 0;
      for (; c + Isa::L <= cols; c += Isa::L) Isa::store(values + c, Isa::load(row + c));
      for (; c < COLS; ++c) values[c] = c < cols ? to_float(row[c]) : 0.f;
      constexpr int kVectors = COLS / Isa::L;
      for (int v = 0; v < kVectors; ++v)
        for (int i = 0; i < Isa::L; ++i) packed[v * Isa::L + i] = values[kVectors * i + Order::first_column(v)];
    }
  }
};

struct Fp32Dot {
  using Element = float;
  static constexpr int kStep = 1;  // ranks per multiply
  static Isa::F multiply_add(const float* p, Isa::F factor, Isa::F acc) { return Isa::fma(Isa::set1(*p), factor, acc); }
};

// packed is [ranks / kStep][COLS][kStep].
template <class Dot, int ROWS, int COLS>
void add_ranks(const typename Dot::Element* p, int64_t stride, const typename Dot::Element* packed, int ranks,
               float* tile) {
  constexpr int kVectors = COLS / Isa::L;
  Isa::F acc[ROWS][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
  for (int j = 0; j < ranks; j += Dot::kStep, packed += COLS * Dot::kStep)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Isa::F factor = Isa::load(reinterpret_cast<const float*>(packed) + v * Isa::L);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][v] = Dot::multiply_add(p + r * stride + j, factor, acc[r][v]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* sums = tile + r * COLS + v * Isa::L;
      Isa::store(sums, Isa::add(Isa::load(sums), acc[r][v]));
    }
}

// tile [args.rows][COLS] holds the sums of columns [col, col + cols); those past `cols` may be written.
template <class Factor, int COLS>
void add_low_rank(const GemmArgs& args, int64_t col, int64_t cols, float* tile) {
  float packed[kRanks * COLS];
  for (int64_t rank = 0; rank < args.rank; rank += kRanks) {
    const int ranks = args.rank - rank < kRanks ? int(args.rank - rank) : kRanks;
    with_type(args.dtype, [&](auto t) {
      const auto* factor = static_cast<const decltype(t)*>(args.low_rank_factor);
      Factor::template pack<COLS>(factor, args, col, cols, rank, ranks, packed);
    });
    const float* p = args.low_rank_x + rank;
    int64_t m = 0;
    for (; m + kLowRankRows <= args.rows; m += kLowRankRows)
      add_ranks<Fp32Dot, kLowRankRows, COLS>(p + m * args.rank, args.rank, packed, ranks, tile + m * COLS);
    for (; m < args.rows; ++m)
      add_ranks<Fp32Dot, 1, COLS>(p + m * args.rank, args.rank, packed, ranks, tile + m * COLS);
  }
}

// One sum of linear's term.
template <class T>
float low_rank_sum(const GemmArgs& args, int64_t m, int64_t n) {
  const float* p = args.low_rank_x + m * args.rank;
  const T* b = static_cast<const T*>(args.low_rank_factor) + n * args.rank;
  Isa::F total = Isa::zero();
  int64_t j = 0;
  for (; j + Isa::L <= args.rank; j += Isa::L) total = Isa::fma(Isa::load(p + j), Isa::load(b + j), total);
  float sum = j == 0 ? 0.f : Isa::reduce_add(total);
  for (; j < args.rank; ++j) sum += p[j] * to_float(b[j]);
  return sum;
}

// y[:, n] of linear from its sums: the term and bias added, rounded once.
template <class T>
void store_column(const GemmArgs& args, int64_t n, const float sums[kGemvRows]) {
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t m = 0; m < args.rows; ++m) {
    const float sum = args.rank > 0 ? sums[m] + low_rank_sum<T>(args, m, n) : sums[m];
    static_cast<T*>(args.out)[m * args.weight.N + n] = from_float<T>(sum + (bias == nullptr ? 0.f : to_float(bias[n])));
  }
}

}  // namespace
}  // namespace nf4
