// The LoRA term, added to fp32 sums before they are rounded: sums[m, c] += sum_j P[m, j] * F[c, j].
//
//   linear         P = s x A^T   F[n, j] = B[n, j]
//   linear_dgrad   P = s dY B    F[k, j] = A[j, k]         P is GemmArgs::lora_inner: fp32, times the scaling s
//
// Who calls    The finishing stage of each product: add_lora_term for a tile of sums, store_column for a column.
// The trick    kTileR columns of F become fp32 registers in the tile's own order of c, once for all m; then 4 rows of P
//              at a time are broadcast from memory. It takes 0.7 % of linear at M = 16 and 64, 0.8 % at 512 (r = 16,
//              4096x4096, one Zen 4 core).
// Rejected     A second pass over y (torch's addmm_): 4.5, 2.8 and 1.5 %, and y is rounded twice.
// Flops        2*M*C*r, which is r / D of the product's, but at the rate of fp32.
// Needs        The tile of sums in L2: all of it is read and written again.
//
//   packed F: one C tile, kTileR = 16 ranks, fp32      add_ranks: kTermTileM = 4 rows of P
//
//     j = 0   | F[c, 0], c in the tile's order |         acc[r][v] += P[m + r, j], broadcast, * packed[j], vector v
//     j = 1   | F[c, 1]                        |         after all j: tile[m + r], vector v, += acc[r][v]
//      ...
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int kTileR = 16;     // ranks summed in registers, before they are added to the tile
constexpr int kTermTileM = 4;  // rows at once: 4 x 2 sums cover the latency of an FMA

// B [N, rank]: the tile holds n in order.
struct LoraB {
  template <int TILE_C, class T>
  static void pack(const T* b, const GemmArgs& args, int64_t n, int64_t n_count, int64_t rank, int ranks,
                   float* packed) {
    for (int64_t c = 0; c < TILE_C; ++c) {
      const T* row = b + (n + (c < n_count ? c : n_count - 1)) * args.rank + rank;
      float values[kTileR + Isa::L];
      int j = 0;
      for (; j + Isa::L <= ranks; j += Isa::L) Isa::store(values + j, Isa::load(row + j));
      for (; j < ranks; ++j) values[j] = to_float(row[j]);
      for (j = 0; j < ranks; ++j) packed[j * TILE_C + c] = values[j];
    }
  }
};

// A [rank, K]: vector v of linear_dgrad's tile holds every V-th k, from Order::first_k(v) on.
template <class Order>
struct LoraA {
  template <int TILE_C, class T>
  static void pack(const T* a, const GemmArgs& args, int64_t k, int64_t k_count, int64_t rank, int ranks,
                   float* packed) {
    for (int j = 0; j < ranks; ++j, packed += TILE_C) {
      const T* row = a + (rank + j) * args.weight.K + k;
      float values[TILE_C];
      int64_t c = 0;
      for (; c + Isa::L <= k_count; c += Isa::L) Isa::store(values + c, Isa::load(row + c));
      for (; c < TILE_C; ++c) values[c] = c < k_count ? to_float(row[c]) : 0.f;
      constexpr int V = TILE_C / Isa::L;
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < Isa::L; ++i) packed[v * Isa::L + i] = values[V * i + Order::first_k(v)];
    }
  }
};

struct Fp32Dot {
  using Element = float;
  static constexpr int kStep = 1;  // ranks per multiply
  static Isa::F multiply_add(const float* p, Isa::F factor, Isa::F acc) { return Isa::fma(Isa::set1(*p), factor, acc); }
};

// tile[TILE_M][TILE_C] += p[TILE_M][ranks] @ packed[ranks / kStep][TILE_C][kStep]; the rows of p lie `stride` apart.
template <class Dot, int TILE_M, int TILE_C>
void add_ranks(const typename Dot::Element* p, int64_t stride, const typename Dot::Element* packed, int ranks,
               float* tile) {
  constexpr int V = TILE_C / Isa::L;
  Isa::F acc[TILE_M][V];
#pragma GCC unroll 8
  for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = Isa::zero();
  for (int j = 0; j < ranks; j += Dot::kStep, packed += TILE_C * Dot::kStep)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Isa::F factor = Isa::load(reinterpret_cast<const float*>(packed) + v * Isa::L);
#pragma GCC unroll 8
      for (int r = 0; r < TILE_M; ++r) acc[r][v] = Dot::multiply_add(p + r * stride + j, factor, acc[r][v]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* sums = tile + r * TILE_C + v * Isa::L;
      Isa::store(sums, Isa::add(Isa::load(sums), acc[r][v]));
    }
}

// tile [M][TILE_C] holds the sums of columns [c, c + c_count); what is past them may be written.
template <class Factor, int TILE_C>
void add_lora_term(const GemmArgs& args, int64_t c, int64_t c_count, float* tile) {
  float packed[kTileR * TILE_C];
  for (int64_t rank = 0; rank < args.rank; rank += kTileR) {
    const int ranks = args.rank - rank < kTileR ? int(args.rank - rank) : kTileR;
    with_type(args.dtype, [&](auto t) {
      const auto* factor = static_cast<const decltype(t)*>(args.lora_factor);
      Factor::template pack<TILE_C>(factor, args, c, c_count, rank, ranks, packed);
    });
    const float* p = args.lora_inner + rank;
    int64_t m = 0;
    for (; m + kTermTileM <= args.M; m += kTermTileM)
      add_ranks<Fp32Dot, kTermTileM, TILE_C>(p + m * args.rank, args.rank, packed, ranks, tile + m * TILE_C);
    for (; m < args.M; ++m)
      add_ranks<Fp32Dot, /*TILE_M=*/1, TILE_C>(p + m * args.rank, args.rank, packed, ranks, tile + m * TILE_C);
  }
}

// The LoRA term of y[m, n] alone, for linear.
template <class T>
float lora_term_of(const GemmArgs& args, int64_t m, int64_t n) {
  const float* p = args.lora_inner + m * args.rank;
  const T* b = static_cast<const T*>(args.lora_factor) + n * args.rank;
  Isa::F total = Isa::zero();
  int64_t j = 0;
  for (; j + Isa::L <= args.rank; j += Isa::L) total = Isa::fma(Isa::load(p + j), Isa::load(b + j), total);
  float sum = j == 0 ? 0.f : Isa::reduce_add(total);
  for (; j < args.rank; ++j) sum += p[j] * to_float(b[j]);
  return sum;
}

// y[:, n] of linear from its sums: the LoRA term and bias added, rounded once.
template <class T>
void store_column(const GemmArgs& args, int64_t n, const float sums[kGemvMaxM]) {
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t m = 0; m < args.M; ++m) {
    const float sum = args.rank > 0 ? sums[m] + lora_term_of<T>(args, m, n) : sums[m];
    static_cast<T*>(args.out)[m * args.weight.N + n] = from_float<T>(sum + (bias == nullptr ? 0.f : to_float(bias[n])));
  }
}

}  // namespace
}  // namespace nf4::cpu
