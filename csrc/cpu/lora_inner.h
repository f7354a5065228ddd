// lora_inner: out[m, j] = sum_d x[m, d] * factor[j, d], LoRA's inner product of one expert's rows
//
//   P = x A^T   factor is A [r, K], D = K
//
// Work split   Rows of x; the caller splits them over threads. An element is summed in the order of d, whoever does it.
// Inner loop   4 rows times kInnerTileR ranks in registers, lanes along d of both, which are contiguous there; the lanes
//              are added up at the end of each kInnerRun of d, so that no running sum has more than 512 terms.
// Rejected     torch's matmul, expert by expert: 369 us for one row of each of 8 experts, against 12, and 973 against
//              371 for 16 rows (bf16, r = 16, D = 2048, a shared core).
// Flops        2*M*r*D, at the rate of bf16 products or of fp32; reads x once for every kInnerTileR ranks, from L1.
// Needs        x and factor of one dtype, contiguous.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int kInnerTileM = 4;
constexpr int kInnerTileR = Isa::L == 16 ? 4 : 2;  // 4 x 4 sums and 5 operands of 32 registers; 4 x 2 and 3 of 16

// L elements of d in fp32.
template <class T>
struct InnerFp32 {
  using Vector = Isa::F;
  static constexpr int kElements = Isa::L;
  static Vector load(const T* p) { return Isa::load(p); }
  static Isa::F multiply_add(Vector a, Vector b, Isa::F acc) { return Isa::fma(a, b, acc); }
};

// sums[TILE_M][TILE_R] of rows x and ranks of factor, which both lie D elements apart.
template <class Dot, int TILE_M, int TILE_R, class T>
void sum_inner_tile(const T* x, const T* factor, int64_t D, float* sums) {
  constexpr int64_t kInnerRun = 512 * Isa::L;
  for (int i = 0; i < TILE_M * TILE_R; ++i) sums[i] = 0.f;
  const int64_t whole = D / Dot::kElements * Dot::kElements;
  for (int64_t begin = 0; begin < whole; begin += kInnerRun) {
    const int64_t end = whole - begin < kInnerRun ? whole : begin + kInnerRun;
    Isa::F acc[TILE_M][TILE_R];
#pragma GCC unroll 4
    for (int m = 0; m < TILE_M; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < TILE_R; ++j) acc[m][j] = Isa::zero();
    for (int64_t d = begin; d < end; d += Dot::kElements) {
      typename Dot::Vector of_rank[TILE_R];
#pragma GCC unroll 4
      for (int j = 0; j < TILE_R; ++j) of_rank[j] = Dot::load(factor + j * D + d);
#pragma GCC unroll 4
      for (int m = 0; m < TILE_M; ++m) {
        const typename Dot::Vector row = Dot::load(x + m * D + d);
#pragma GCC unroll 4
        for (int j = 0; j < TILE_R; ++j) acc[m][j] = Dot::multiply_add(row, of_rank[j], acc[m][j]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < TILE_M; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < TILE_R; ++j) sums[m * TILE_R + j] += Isa::reduce_add(acc[m][j]);
  }
  for (int64_t d = whole; d < D; ++d)
    for (int m = 0; m < TILE_M; ++m)
      for (int j = 0; j < TILE_R; ++j) sums[m * TILE_R + j] += to_float(x[m * D + d]) * to_float(factor[j * D + d]);
}

template <class Dot, int TILE_M, int TILE_R, class T>
void store_inner_tile(const LoraInnerArgs& args, int64_t m, int64_t rank) {
  float sums[TILE_M * TILE_R];
  const T *x = static_cast<const T*>(args.x) + m * args.D, *factor = static_cast<const T*>(args.factor) + rank * args.D;
  sum_inner_tile<Dot, TILE_M, TILE_R>(x, factor, args.D, sums);
  T* out = static_cast<T*>(args.out) + m * args.rank + rank;
  for (int i = 0; i < TILE_M; ++i)
    for (int j = 0; j < TILE_R; ++j) out[i * args.rank + j] = from_float<T>(sums[i * TILE_R + j]);
}

template <class Dot, int TILE_M, class T>
void store_inner_rows(const LoraInnerArgs& args, int64_t m) {
  int64_t rank = 0;
  for (; rank + kInnerTileR <= args.rank; rank += kInnerTileR)
    store_inner_tile<Dot, TILE_M, kInnerTileR, T>(args, m, rank);
  for (; rank < args.rank; ++rank) store_inner_tile<Dot, TILE_M, /*TILE_R=*/1, T>(args, m, rank);
}

// LoraInnerFn; Dot<T> is for x of T.
template <template <class> class Dot>
void lora_inner_rows(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t m = m_begin;
    for (; m + kInnerTileM <= m_end; m += kInnerTileM) store_inner_rows<Dot<T>, kInnerTileM, T>(args, m);
    for (; m < m_end; ++m) store_inner_rows<Dot<T>, /*TILE_M=*/1, T>(args, m);
  });
}

}  // namespace
}  // namespace nf4::cpu
