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
// Prefetch     A run of 512 columns goes through all its tiles, and each prefetches its share of the next run, row
//              after row, into the L2. A tile alone would read a line of each row, which no prefetcher follows: out of
//              cache, M = 512, C = 576 in fp32 with AVX2, 232 to 167 us, where reading takes 50 and the products 85;
//              C = 1536 in bf16, 357 to 225. Runs of 32 rows are as fast, of 128 slower: 193 us. (One Zen 4 core.)
#pragma once

#include "lora_term.h"
#include "rows.h"

namespace nf4::cpu {
namespace {

constexpr int kGradTileC = 2 * Isa::L;
constexpr int kGradGroup = 512 / kGradTileC;  // C tiles whose rows are read together
constexpr int kRunM = 64;                     // rows summed in registers
constexpr int64_t kBlockM = 512 * kRunM;      // rows summed in one tile: at most 512 terms a running sum
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

static inline int64_t columns_from(int64_t c, int64_t C) { return C - c < kGradTileC ? C - c : kGradTileC; }

// sums [tiles][ranks][kGradTileC] of rows [begin, end) of wide. Dot::load takes kStep rows; the second is null past the
// end.
template <class Dot, class T>
void sum_grad_tiles(const LoraGradArgs& args, int64_t begin, int64_t end, int64_t rank, int ranks, int64_t c, int tiles,
                    float* sums) {
  using Element = typename Dot::Element;
  alignas(64) Element run[kRunM * kGradTileC];
  std::memset(sums, 0, size_t(tiles) * ranks * kGradTileC * sizeof(float));
  const T* wide = static_cast<const T*>(args.wide) + c;
  for (int64_t m = begin; m < end; m += kRunM) {
    const int m_count = end - m < kRunM ? int(end - m) : kRunM;
    const Element* lora_inner = static_cast<const Element*>(args.lora_inner) + rank * args.lora_inner_stride + m;
    float* out = sums;
    for (int t = 0; t < tiles; ++t) {
      if (end - m > kRunM) {  // the next run, row after row, a share beside each tile
        const int64_t first = m + kRunM + kRunM * t / tiles, next_end = m + kRunM + kRunM * (t + 1) / tiles;
        for (int64_t next = first; next < next_end && next < end; ++next)
          for (int line = 0; line < tiles * kGradTileC; line += 64 / int(sizeof(T)))
            __builtin_prefetch(wide + next * args.C + line, 0, 2);
      }
      const int64_t c_count = columns_from(c + t * kGradTileC, args.C);
      for (int i = 0; i < m_count; i += Dot::kStep) {
        const T* row = wide + (m + i) * args.C + t * kGradTileC;
        Dot::load(row, i + 1 < m_count ? row + args.C : nullptr, c_count, run + i * kGradTileC);
      }
      int j = 0;
      for (; j + kTermTileM <= ranks; j += kTermTileM, out += kTermTileM * kGradTileC)
        add_ranks<Dot, kTermTileM, kGradTileC>(lora_inner + j * args.lora_inner_stride, args.lora_inner_stride, run,
                                               m_count, out);
      for (; j < ranks; ++j, out += kGradTileC)
        add_ranks<Dot, /*TILE_M=*/1, kGradTileC>(lora_inner + j * args.lora_inner_stride, args.lora_inner_stride, run,
                                                 m_count, out);
    }
  }
}

template <class T>
void store_scaled(T* __restrict out, const float* __restrict sums, int64_t count, float scaling) {
  int64_t i = 0;
  for (; i + Isa::L <= count; i += Isa::L) Isa::store(out + i, Isa::mul(Isa::load(sums + i), Isa::set1(scaling)));
  for (; i < count; ++i) out[i] = from_float<T>(sums[i] * scaling);
}

// out's columns of one tile, from its sums [ranks][kGradTileC]; `columns` has as much room.
static inline void store_grad_tile(const LoraGradArgs& args, int64_t rank, int ranks, int64_t c, const float* sums,
                                   float* columns) {
  const int64_t c_count = columns_from(c, args.C);
  with_type(args.out_dtype, [&](auto t) {
    auto* out = static_cast<decltype(t)*>(args.out);
    if (args.transposed) {
      const int stride = (ranks + Isa::L - 1) / Isa::L * Isa::L;
      for (int j = 0; j < ranks; j += Isa::L) {
        const uint8_t* rows[Isa::L];
        for (int r = 0; r < Isa::L; ++r)
          rows[r] = reinterpret_cast<const uint8_t*>(sums + (j + r < ranks ? j + r : j) * kGradTileC);
        transpose_words(rows, kGradTileC, stride * 4, columns + j);
      }
      for (int64_t i = 0; i < c_count; ++i)
        store_scaled(out + (c + i) * args.rank + rank, columns + i * stride, ranks, args.scaling);
    } else {
      for (int64_t j = 0; j < ranks; ++j)
        store_scaled(out + (rank + j) * args.C + c, sums + j * kGradTileC, c_count, args.scaling);
    }
  });
}

// LoraGradFn; Dot<T> is for wide of T.
template <template <class> class Dot>
void lora_grad_tiles(const LoraGradArgs& args, int64_t tile_begin, int64_t tile_end) {
  constexpr int kTileSums = kPassR * kGradTileC, kSums = kGradGroup * kTileSums;
  float tile_sums[2 * kTileSums];
  const bool is_one_run = args.M <= kRunM;  // then the sums had better stay in the L1
  auto* sums = is_one_run ? tile_sums : static_cast<float*>(thread_workspace(2 * kSums * sizeof(float)));
  float* block = is_one_run ? tile_sums + kTileSums : sums + kSums;
  const int group = is_one_run ? 1 : kGradGroup;
  for (int64_t tile = tile_begin; tile < tile_end; tile += group) {
    const int tiles = tile_end - tile < group ? int(tile_end - tile) : group;
    const int64_t c = tile * kGradTileC;
    for (int64_t rank = 0; rank < args.rank; rank += kPassR) {
      const int ranks = args.rank - rank < kPassR ? int(args.rank - rank) : kPassR;
      with_type(args.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t begin = 0; begin == 0 || begin < args.M; begin += kBlockM) {
          const int64_t end = args.M - begin < kBlockM ? args.M : begin + kBlockM;
          sum_grad_tiles<Dot<T>, T>(args, begin, end, rank, ranks, c, tiles, begin == 0 ? sums : block);
          for (int i = 0; begin > 0 && i < tiles * ranks * kGradTileC; ++i) sums[i] += block[i];
        }
      });
      for (int i = 0; i < tiles; ++i)
        store_grad_tile(args, rank, ranks, c + i * kGradTileC, sums + i * ranks * kGradTileC, block);
    }
  }
}

}  // namespace
}  // namespace nf4::cpu
