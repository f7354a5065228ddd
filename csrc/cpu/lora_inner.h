// lora_inner: out[m, j] = sum_d x[m, d] * factor[j, d], LoRA's inner product of the rows of one expert, or of one weight
//
//   P = x A^T   factor is A [r, K], D = K        Q = dY B   factor is B [N, r], D = N: `transposed`
//
// Work split   Rows of x; the caller splits them over threads. An element is summed in the order of d, whoever does it.
// Inner loop   kPackedD columns of kTileR ranks are packed once for all rows, zeros in the place of ranks that are not
//              there; then add_ranks sums kPackedTileM rows of x, whose elements are broadcast.
//              For fewer than kPackedMinM rows A is not packed, which would take longer than the product: 4 rows times
//              kInnerTileR ranks in registers, lanes along d of both, added up at the end of each kInnerRun of d.
//              Either way no running sum has more than 512 terms.
// Rejected     torch's matmul, in us for M = 512 and D = 576, 1536 and 4096 (r = 16, two Zen 4 cores):
//
//                                       D = 576               1536                 4096
//                fp32, AVX2             99 against 62         310 against 185      909 against 441
//                bf16, AVX2     x A^T   261 against 76        588 against 190      1460 against 458
//                               dY B    2640 against 68       7050 against 180     18860 against 434
//                bf16 instructions      63 against 31         119 against 73       282 against 173
//
//              6 rows at once with AVX2: the compiler spills, 120 us instead of 62. 512 columns packed at once: with the
//              converted rows of bf16 they leave the L1, 636 us instead of 458.
// Flops        2*M*r*D, at the rate of bf16 products or of fp32; reads x once for every kTileR ranks.
// Needs        x and factor of one dtype, contiguous.
#pragma once

#include "lora_term.h"
#include "rows.h"

namespace nf4::cpu {
namespace {

constexpr int kInnerTileM = 4;
constexpr int kInnerTileR = Isa::L == 16 ? 4 : 2;  // 4 x 4 sums and 5 operands of 32 registers; 4 x 2 and 3 of 16

constexpr int kPackedMinM = 16;                     // of one expert, where both take as long
constexpr int kPackedTileM = Isa::L == 16 ? 8 : 4;  // 8 x 1 sums; 4 x 2
constexpr int kPackedD = 256;                       // 16 KB, which stay in the L1
constexpr int kPackedM = 192;                       // rows that share a packed part: 12 KB of sums
constexpr int64_t kPackedBlockD = 512 * kPackedD;   // at most 512 such parts in one sum
constexpr int kFp32Run = 64;  // columns summed in a register: 256 were less exact than MKL on a Xeon
constexpr int kPackD = 64;    // columns packed at once, by way of 4 KB in the L1

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

// packed [count / kStep][kTileR][kStep] of columns [d, d + count) of A's `ranks` rows from `rank` on: 32-bit words, of
// one fp32 or of two bf16, change places.
template <class Dot, class T>
void pack_factor(const LoraInnerArgs& args, int64_t rank, int ranks, int64_t d, int count,
                 typename Dot::Element* packed) {
  using Element = typename Dot::Element;
  alignas(64) Element rows[kTileR][kPackD];
  const uint8_t* begins[kTileR];
  for (int j = 0; j < kTileR; ++j) begins[j] = reinterpret_cast<const uint8_t*>(rows[j]);
  for (int j = ranks; j < kTileR; ++j) std::memset(static_cast<void*>(rows[j]), 0, sizeof rows[j]);
  const T* factor = static_cast<const T*>(args.factor) + rank * args.D + d;
  for (int begin = 0; begin < count; begin += kPackD, factor += kPackD) {
    const int columns = count - begin < kPackD ? count - begin : kPackD;
    for (int j = 0; j < ranks; ++j) convert_row(factor + j * args.D, columns, kPackD, rows[j]);
    for (int j = 0; j < kTileR; j += Isa::L)
      transpose_words(begins + j, int(sizeof rows[0]) / 4, kTileR * 4, packed + begin * kTileR + j * Dot::kStep);
  }
}

// The same of B, whose rows are columns of A.
template <class Dot, class T>
void pack_transposed(const LoraInnerArgs& args, int64_t rank, int ranks, int64_t d, int count,
                     typename Dot::Element* packed) {
  const T* row = static_cast<const T*>(args.factor) + d * args.rank + rank;
  for (int i = 0; i < count; i += Dot::kStep, packed += kTileR * Dot::kStep, row += args.rank * Dot::kStep)
    Dot::pack_row(row, i + 1 < count ? row + args.rank : nullptr, ranks, packed);
}

// One column of ranks in fp32.
struct PackedFp32 : Fp32Dot {
  template <class T>
  static void pack_row(const T* row, const T*, int ranks, float* packed) {
    convert_row(row, ranks, kTileR, packed);
  }
};

// sums[TILE_M][kTileR] += rows of x times packed columns [d, d + count).
template <class Dot, int TILE_M, class T>
void add_packed(const T* x, int64_t D, int count, const typename Dot::Element* packed, float* sums) {
  using Element = typename Dot::Element;
  constexpr bool kSame = Same<T, Element>::value;
  constexpr int kRun = Dot::kStep == 1 ? kFp32Run : kPackedD;
  const auto add_runs = [&](const Element* rows, int64_t stride) {
    for (int d = 0; d < count; d += kRun)
      add_ranks<Dot, TILE_M, kTileR>(rows + d, stride, packed + d * kTileR, count - d < kRun ? count - d : kRun, sums);
  };
  if constexpr (kSame) {
    if (count % Dot::kStep == 0) return add_runs(x, D);
  }
  alignas(64) Element rows[TILE_M * kPackedD];
  for (int m = 0; m < TILE_M; ++m)
    convert_row(x + m * D, count, (count + Dot::kStep - 1) / Dot::kStep * Dot::kStep, rows + m * kPackedD);
  add_runs(rows, kPackedD);
}

// Rows [m_begin, m_end), at most kPackedM.
template <class Dot, class T>
void store_packed_rows(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end, int64_t rank) {
  alignas(64) typename Dot::Element packed[kPackedD * kTileR];
  alignas(64) float sums[kPackedM * kTileR], blocks[kPackedM * kTileR];
  const int ranks = args.rank - rank < kTileR ? int(args.rank - rank) : kTileR;
  const int rows = int(m_end - m_begin);
  std::memset(sums, 0, size_t(rows) * kTileR * sizeof(float));
  for (int64_t d = 0; d < args.D; d += kPackedD) {
    if (d > 0 && d % kPackedBlockD == 0) {
      for (int i = 0; i < rows * kTileR; ++i) blocks[i] = d == kPackedBlockD ? sums[i] : blocks[i] + sums[i];
      std::memset(sums, 0, size_t(rows) * kTileR * sizeof(float));
    }
    const int count = args.D - d < kPackedD ? int(args.D - d) : kPackedD;
    (args.transposed ? pack_transposed<Dot, T> : pack_factor<Dot, T>)(args, rank, ranks, d, count, packed);
    const T* x = static_cast<const T*>(args.x) + m_begin * args.D + d;
    int m = 0;
    for (; m + kPackedTileM <= rows; m += kPackedTileM)
      add_packed<Dot, kPackedTileM>(x + m * args.D, args.D, count, packed, sums + m * kTileR);
    for (; m + kPackedTileM / 2 <= rows; m += kPackedTileM / 2)
      add_packed<Dot, kPackedTileM / 2>(x + m * args.D, args.D, count, packed, sums + m * kTileR);
    for (; m < rows; ++m) add_packed<Dot, /*TILE_M=*/1>(x + m * args.D, args.D, count, packed, sums + m * kTileR);
  }
  for (int i = 0; args.D > kPackedBlockD && i < rows * kTileR; ++i) sums[i] += blocks[i];
  T* out = static_cast<T*>(args.out) + m_begin * args.rank + rank;
  for (int m = 0; m < rows; ++m) convert_row(sums + m * kTileR, ranks, ranks, out + m * args.rank);
}

// LoraInnerFn; Dot<T> is for x of T, Packed its packed form.
template <template <class> class Dot, class Packed>
void lora_inner_rows(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t m = m_begin;
    if (!args.transposed && args.M < kPackedMinM) {
      for (; m + kInnerTileM <= m_end; m += kInnerTileM) store_inner_rows<Dot<T>, kInnerTileM, T>(args, m);
      for (; m < m_end; ++m) store_inner_rows<Dot<T>, /*TILE_M=*/1, T>(args, m);
      return;
    }
    for (; m < m_end; m += kPackedM)
      for (int64_t rank = 0; rank < args.rank; rank += kTileR)
        store_packed_rows<Packed, T>(args, m, m_end - m < kPackedM ? m_end : m + kPackedM, rank);
  });
}

}  // namespace
}  // namespace nf4::cpu
