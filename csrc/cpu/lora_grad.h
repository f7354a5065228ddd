// lora_grad: out[j, c] = scaling * sum_m lora_inner[m, j] * wide[m, c], the gradient of a LoRA factor
//
//   dA [r, K]   lora_inner is Q = dY B, wide is x, C = K        dB [N, r]   lora_inner is P = x A^T, wide is dY, C = N
//
// Read first   add_ranks of lora_term.h.
// Work split   C tiles of 2L. The caller splits them over threads; a tile is summed in the order of m, whoever does it.
// Inner loop   kRunM rows of a tile of wide become fp32 once (bf16: pairs of rows, for vdpbf16ps), then add_ranks sums
//              4 x 2 registers, with ranks in the place of its rows and m in the place of its ranks. Up to kPassR ranks
//              share one pass over wide.
// Rejected     torch's matmul: 551 (dA) and 631 us (dB) against 470 and 496 at M = 512; at M = 16, 40 against 29 in a
//              loop of its own, and 148 (dA) and 75 (dB) against 56 and 61 within a training step (bf16, r = 16,
//              C = 4096, one Zen 4 core). It also rounds to the dtype of wide before an fp32 adapter gets the result.
// Flops        2*M*r*C, at the rate of bf16 products or of fp32; reads wide once.
// Prefetch     The rows of the next run: they lie C elements apart, which the hardware does not follow.
#pragma once

#include "lora_term.h"

namespace nf4::cpu {
namespace {

constexpr int kGradTileC = 2 * Isa::L;
constexpr int kRunM = 64;                 // rows summed in registers
constexpr int64_t kBlockM = 512 * kRunM;  // rows summed in one tile: at most 512 terms a running sum
constexpr int kPassR = 64;

// One row of a tile of wide in fp32, zero past c_count.
template <class T>
struct GradFp32 : Fp32Dot {
  static void load(const T* row, const T*, int64_t c_count, float* out) {
    for (int v = 0; v < kGradTileC; v += Isa::L) {
      if (v + Isa::L <= c_count) {
        Isa::store(out + v, Isa::load(row + v));
      } else {
        Isa::store(out + v, Isa::zero());
        for (int64_t c = v; c < c_count; ++c) out[c] = to_float(row[c]);
      }
    }
  }
};

// sums [ranks][kGradTileC] of rows [begin, end) of wide. Dot::load takes kStep rows, the second null past the end.
template <class Dot, class T>
void sum_grad_tile(const LoraGradArgs& args, int64_t begin, int64_t end, int64_t rank, int ranks, int64_t c,
                   int64_t c_count, float* sums) {
  using Element = typename Dot::Element;
  alignas(64) Element run[kRunM * kGradTileC];
  std::memset(sums, 0, size_t(ranks) * kGradTileC * sizeof(float));
  const T* wide = static_cast<const T*>(args.wide) + c;
  for (int64_t m = begin; m < end; m += kRunM) {
    const int m_count = end - m < kRunM ? int(end - m) : kRunM;
    for (int i = 0; i < m_count; i += Dot::kStep) {
      const T *row = wide + (m + i) * args.C, *next = i + 1 < m_count ? row + args.C : nullptr;
      for (int s = 0; s < Dot::kStep && m + i + s + kRunM < end; ++s) __builtin_prefetch(row + (kRunM + s) * args.C);
      Dot::load(row, next, c_count, run + i * kGradTileC);
    }
    const Element* lora_inner = static_cast<const Element*>(args.lora_inner) + rank * args.lora_inner_stride + m;
    int j = 0;
    for (; j + kTermTileM <= ranks; j += kTermTileM)
      add_ranks<Dot, kTermTileM, kGradTileC>(lora_inner + j * args.lora_inner_stride, args.lora_inner_stride, run,
                                             m_count, sums + j * kGradTileC);
    for (; j < ranks; ++j)
      add_ranks<Dot, /*TILE_M=*/1, kGradTileC>(lora_inner + j * args.lora_inner_stride, args.lora_inner_stride, run,
                                               m_count, sums + j * kGradTileC);
  }
}

template <class T>
void store_scaled(T* out, const float* sums, int64_t count, float scaling) {
  int64_t i = 0;
  for (; i + Isa::L <= count; i += Isa::L) Isa::store(out + i, Isa::mul(Isa::load(sums + i), Isa::set1(scaling)));
  for (; i < count; ++i) out[i] = from_float<T>(sums[i] * scaling);
}

// LoraGradFn; Dot<T> is for wide of T.
template <template <class> class Dot>
void lora_grad_tiles(const LoraGradArgs& args, int64_t tile_begin, int64_t tile_end) {
  float sums[kPassR * kGradTileC], block[kPassR * kGradTileC];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t c = tile * kGradTileC, c_count = args.C - c < kGradTileC ? args.C - c : kGradTileC;
    for (int64_t rank = 0; rank < args.rank; rank += kPassR) {
      const int ranks = args.rank - rank < kPassR ? int(args.rank - rank) : kPassR;
      with_type(args.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t begin = 0; begin == 0 || begin < args.M; begin += kBlockM) {
          const int64_t end = args.M - begin < kBlockM ? args.M : begin + kBlockM;
          sum_grad_tile<Dot<T>, T>(args, begin, end, rank, ranks, c, c_count, begin == 0 ? sums : block);
          for (int i = 0; begin > 0 && i < ranks * kGradTileC; ++i) sums[i] += block[i];
        }
      });
      with_type(args.out_dtype, [&](auto t) {
        auto* out = static_cast<decltype(t)*>(args.out);
        if (args.transposed) {
          // The whole tile first: a vector load right after the scalar stores that it covers waits for them, 40 cycles.
          for (int64_t i = 0; i < c_count; ++i)
            for (int j = 0; j < ranks; ++j) block[i * ranks + j] = sums[j * kGradTileC + i];
          for (int64_t i = 0; i < c_count; ++i)
            store_scaled(out + (c + i) * args.rank + rank, block + i * ranks, ranks, args.scaling);
        } else {
          for (int64_t j = 0; j < ranks; ++j)
            store_scaled(out + (rank + j) * args.C + c, sums + j * kGradTileC, c_count, args.scaling);
        }
      });
    }
  }
}

}  // namespace
}  // namespace nf4::cpu
