// The blocked product of linear and linear_dgrad on AMX tiles, in bf16: out[m, c] = sum_d x[m, d] * B[d, c].
// Read first: kernels.h, for M, C and D.
//
//   pack        x into tiles, once for up to kPassM = 512 rows                             all threads
//   for each group of C tiles, 256 columns                                                 a thread's share
//     for each slice of D, for each C tile of the group
//       decode    B[slice, C tile] into 32 tiles of bf16, scaled: 32 KB, which stay in L1
//       for each M tile of 16 rows: tiles of fp32 sums, 2 at a time, += its tiles of x times the slice
//     for each slice of LoRA's rank: the same, of the tiles of P or Q and of s B or s A
//     store       the sums, rounded once, with bias
//
//   A tile is 16 rows of 64 bytes, and tdpbf16ps adds 16 x 16 x 32 products to one of sums, in 16 cycles:
//
//     first operand   row i: 32 elements of D            second operand   row p: pairs (d 2p, 2p + 1) of 16 columns
//     sums            row i: 16 columns, fp32
//
// The trick      16 levels times the scale of a block are 16 numbers of bf16: two blocks' are a table of 32, made by
//                one vcvtne2ps2bf16, and a lookup by vpermw gives 32 weights, scaled and rounded as dequantize rounds
//                them.
// Four tiles     Two of sums, one of x and one of B, though there are eight: where another process runs on the core's
//                other hyperthread a tdpbf16ps takes 11 ns with four of them in use, 16 with six, 20 to 23 with seven
//                and 25 to 33 with eight, in any order of loads; alone it takes 6 ns in each case, which is its peak
//                (operands in L1, an Emerald Rapids Xeon). Dense torch's uses eight: 1.0 to 1.7 times as long as this
//                whole product.
// Slices         512 of D of 32 columns, where the sums are loaded and stored half as often and rows of W are read and
//                decoded in longer pieces than in 256 of 64: linear 1.0 to 1.13 times as fast at M = 16 and 64, or 1.05
//                to 1.26 while the cores' other hyperthreads are busy, 1.0 to 1.1 at 256 and 512. linear_dgrad has 64
//                columns all the same: a register of its codes is of so many.
// Why groups     x in tiles is 4 MB at M = 512, D = 4096: it comes from L3 once for 256 columns, not for each C tile.
// Streams        x and sums are loaded with the hint that they are not kept, so that less of the slice leaves L1: 1.01 to
//                1.16 times as fast at M = 16 to 512; for the slice, too, 0.97 to 1.03.
// Rejected       Slices of 128 of D, which leave room in L1 (0.9 to 1.0 times as fast at M = 16 to 512); x and sums
//                prefetched into L1 (0.7 to 0.8 times), x into L2 (0.95).
// LoRA           As dequantize_gemm.h has it: the scaling is in the factor, and the term is more of the contraction.
// Bytes, flops   2*M*N*K flops; 4096x4096 at M = 16 takes 0.6 ms to multiply and 1.1 to decode, two such cores.
// Needs          x, out and the factors in bf16. Where rows of W are not whole runs of 64 codes, or a run has more than
//                one scale, and for int8, rows are decoded as spans, then spread over the tiles.
//
// A Core is a TileShape and says how the operands lie in tiles: linear_amx_bf16.cpp and linear_dgrad_amx_bf16.cpp.
//
//   kStep                    D is padded to whole steps of it, in a panel and in a slice
//   kIsWeightFirst           the tiles of B are the first operand, so that sums are [c][m]
//   kSumTile, kSumRowBytes   where the tiles of sums lie in the 16 x kTileC of an M tile
//   pack                     rows [0, m_count) x columns [0, d_count) of x into tiles, zeros past the columns
//   decode                   kTileC columns of B into a slice, if W's rows are runs of 64 codes
//   spread                   the same of any matrix whose rows a function gives in bf16: LoRA's factor, other weights
//   store                    a finished 16 x kTileC
#pragma once

#include "codes_avx512.h"
#include "decode_int8.h"
#include "decode_span.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

constexpr int kAmxRows = 16, kAmxDepth = 32;     // of a tile of bf16
constexpr int kAmxTile = kAmxRows * kAmxDepth;   // elements
constexpr int64_t kAmxBlockD = 512 * kAmxDepth;  // in one running sum: design.md, section 7

// Slices whose rows are TILES tiles of B.
template <int TILES>
struct TileShape {
  static constexpr int kTiles = TILES, kTileC = TILES * 16, kSums = kAmxRows * kTileC;
  static constexpr int kSliceTiles = 32, kGroup = 16 / TILES;  // C tiles of a group
  static constexpr int64_t kSliceD = kSliceTiles / TILES * kAmxDepth;
};

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, zeros[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// GCC 12's intrinsics say that they touch 8 bytes of a configuration, and none of what a tile is loaded from.
static inline void touch_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }
static inline void use_tiles(const TileConfig& config) {
  touch_memory(&config);
  _tile_loadconfig(&config);
}
// All 8 tiles in full size; returns what they were. A library that configures tiles less often than it uses them has to
// find its own configuration again.
static inline TileConfig use_full_tiles() {
  TileConfig before, full{};
  _tile_storeconfig(&before);
  touch_memory(&before);
  full.palette = 1;
  for (int i = 0; i < 8; ++i) {
    full.row_bytes[i] = 64;
    full.rows[i] = kAmxRows;
  }
  use_tiles(full);
  return before;
}

// Two tiles of sums = or += steps tiles of x times steps tiles of b for each. Tiles 0 and 1 are sums, 2 is
// of x, 3 of b: GCC wants their numbers as literals.
template <class Core>
void multiply_two(const BFloat16* x, const BFloat16* b, int64_t steps, bool is_first, float* sums) {
  float* next_sums = sums + Core::kSumTile;
  touch_memory(x);
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_stream_loadd(0, sums, Core::kSumRowBytes);
    _tile_stream_loadd(1, next_sums, Core::kSumRowBytes);
  }
  for (int64_t s = 0; s < steps; ++s, x += kAmxTile, b += Core::kTiles * kAmxTile) {
    _tile_stream_loadd(2, x, 64);
    _tile_loadd(3, b, 64);
    if constexpr (Core::kIsWeightFirst) {
      _tile_dpbf16ps(0, 3, 2);
      _tile_loadd(3, b + kAmxTile, 64);
      _tile_dpbf16ps(1, 3, 2);
    } else {
      _tile_dpbf16ps(0, 2, 3);
      _tile_loadd(3, b + kAmxTile, 64);
      _tile_dpbf16ps(1, 2, 3);
    }
  }
  _tile_stored(0, sums, Core::kSumRowBytes);
  _tile_stored(1, next_sums, Core::kSumRowBytes);
}

// sums[16 x kTileC] = or += steps tiles of x times steps x kTiles tiles of b.
template <class Core>
void multiply_tiles(const BFloat16* x, const BFloat16* b, int64_t steps, bool is_first, float* sums) {
  for (int g = 0; g < Core::kTiles; g += 2)
    multiply_two<Core>(x, b + g * kAmxTile, steps, is_first, sums + g * Core::kSumTile);
}

// Tiles of D columns in a panel or slice.
template <class Core>
int64_t depth_tiles(int64_t D) {
  return round_up(D, Core::kStep) / kAmxDepth;
}

// The tiles [begin, end) of M, of rows of x that are `stride` elements apart. A panel has the tiles of all M of a slice
// before those of the next slice: M tile after M tile they would lie D/16 KB apart, in the same few sets of L2.
template <class Core>
void pack_m_tiles(const BFloat16* x, int64_t stride, int64_t M, int64_t D, int64_t begin, int64_t end,
                  BFloat16* panel) {
  const int64_t m_tiles = ceil_div(M, kAmxRows);
  for (int64_t d = 0; d < D; d += Core::kSliceD, panel += m_tiles * Core::kSliceD / kAmxDepth * kAmxTile) {
    const int64_t d_count = D - d < Core::kSliceD ? D - d : Core::kSliceD;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m = t * kAmxRows, m_count = M - m < kAmxRows ? M - m : kAmxRows;
      Core::pack(x + m * stride + d, stride, m_count, d_count, panel + t * depth_tiles<Core>(d_count) * kAmxTile);
    }
  }
}

// GemmPackFn.
template <class Core>
void pack_tiles_bf16(const void* x, Dtype, int64_t M, int64_t D, int64_t begin, int64_t end, void* panel) {
  pack_m_tiles<Core>(static_cast<const BFloat16*>(x), D, M, D, begin, end, static_cast<BFloat16*>(panel));
}

// The workspace of a thread.
template <class Core>
struct AmxWorkspace {
  alignas(64) BFloat16 slice[Core::kSliceTiles * kAmxTile];
  alignas(64) BFloat16 inner[kPassM * Core::kSliceD];  // tiles of P or Q
  alignas(64) float sums[Core::kGroup][kPassM / kAmxRows][Core::kSums];
};

// `count` C tiles of a product, from one on: what a thread finishes at a time.
template <class Core>
struct TileGroup {
  const GemmArgs& args;
  const int64_t D, C, first_tile, count;
  AmxWorkspace<Core>& space;
  const int64_t m_tiles = ceil_div(args.M, kAmxRows);
  const bool has_blocks = D > kAmxBlockD;  // then the second half of sums is of the blocks before

  // Of a thread's tiles [begin, end).
  static int64_t count_at(int64_t begin, int64_t end, int64_t D) {
    const int64_t most = D > kAmxBlockD ? Core::kGroup / 2 : Core::kGroup;
    return end - begin < most ? end - begin : most;
  }
  int64_t first_c(int64_t g) const { return (first_tile + g) * Core::kTileC; }

  // sums = or += the tiles of x times the slice that decode(g) fills, for each C tile.
  template <class Decode>
  void add_products(const BFloat16* x, int64_t depth, bool is_first, Decode decode) {
    for (int64_t g = 0; g < count; ++g) {
      decode(g);
      for (int64_t t = 0; t < m_tiles; ++t)
        multiply_tiles<Core>(x + t * depth * kAmxTile, space.slice, depth, is_first, space.sums[g][t]);
    }
  }
  template <class Add>
  void add_block(Add add) {
    for (int64_t g = 0; g < count; ++g)
      for (int64_t t = 0; t < m_tiles; ++t)
        for (int i = 0; i < Core::kSums; ++i) add(space.sums[g][t][i], space.sums[g + Core::kGroup / 2][t][i]);
  }

  void multiply_weight() {
    const Weight& w = args.weight;
    const auto* panel = static_cast<const BFloat16*>(args.panel);
    const bool has_runs = !is_int8(w) && code_run(w) == 64;
    const auto decode_row = [&](int64_t row, int64_t column, int64_t elements, BFloat16* out) {
      (is_int8(w) ? decode_int8<BFloat16> : decode_span<BFloat16>)(w, row * w.K + column, elements, out);
    };
    for (int64_t d = 0; d == 0 || d < D; d += Core::kSliceD) {  // D = 0 writes zeros
      const bool is_first = d % kAmxBlockD == 0;
      if (d > 0 && is_first)
        add_block([&](float sum, float& before) { before = d == kAmxBlockD ? sum : before + sum; });
      const int64_t d_count = D - d < Core::kSliceD ? D - d : Core::kSliceD;
      add_products(panel + m_tiles * d / kAmxDepth * kAmxTile, depth_tiles<Core>(d_count), is_first, [&](int64_t g) {
        if (has_runs)
          Core::decode(w, first_c(g), d, d_count, space.slice);
        else
          Core::spread(decode_row, first_c(g), C - first_c(g), d, d_count, space.slice);
      });
    }
  }

  void add_lora() {
    const auto* factor = static_cast<const BFloat16*>(args.lora_factor);
    const int64_t factor_row = Core::kIsWeightFirst ? args.rank : C;  // B [N, rank], A [rank, K]
    const auto scale_row = [&](int64_t row, int64_t column, int64_t elements, BFloat16* out) {
      for (int64_t i = 0; i < elements; ++i)
        out[i] = from_float<BFloat16>(to_float(factor[row * factor_row + column + i]) * args.scaling);
    };
    for (int64_t rank = 0; rank < args.rank; rank += Core::kSliceD) {
      const int64_t ranks = args.rank - rank < Core::kSliceD ? args.rank - rank : Core::kSliceD;
      const auto* unscaled = static_cast<const BFloat16*>(args.unscaled_inner) + rank;
      pack_m_tiles<Core>(unscaled, args.rank, args.M, ranks, 0, m_tiles, space.inner);
      add_products(space.inner, depth_tiles<Core>(ranks), /*is_first=*/false,
                   [&](int64_t g) { Core::spread(scale_row, first_c(g), C - first_c(g), rank, ranks, space.slice); });
    }
  }

  void store() {
    if (has_blocks) add_block([](float& sum, float before) { sum += before; });
    for (int64_t t = 0; t < m_tiles; ++t)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t m = t * kAmxRows, c = first_c(g);
        Core::store(args, m, args.M - m < kAmxRows ? args.M - m : kAmxRows, c, C - c, space.sums[g][t]);
      }
  }
};

template <class Core>
void gemm_tiles(const GemmArgs& args, int64_t D, int64_t C, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const TileConfig config = use_full_tiles();
  for (int64_t tile = tile_begin; tile < tile_end;) {
    const int64_t count = TileGroup<Core>::count_at(tile, tile_end, D);
    TileGroup<Core> group{args, D, C, tile, count, *static_cast<AmxWorkspace<Core>*>(workspace)};
    group.multiply_weight();
    group.add_lora();
    group.store();
    tile += count;
  }
  use_tiles(config);
}

template <class Core>
constexpr GemmKernel describe_tiles(GemmFn run) {
  return {kAmxRows,
          Core::kTileC,
          Core::kStep,
          int(sizeof(BFloat16)),
          int64_t(sizeof(AmxWorkspace<Core>)),
          pack_tiles_bf16<Core>,
          run};
}

// 64 elements: those of even index, then those of odd.
static inline void split(Isa::I low, Isa::I high, Isa::I& even, Isa::I& odd) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = uint16_t(2 * i);
  const Isa::I evens = _mm512_load_si512(index), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  even = _mm512_permutex2var_epi16(low, evens, high);
  odd = _mm512_permutex2var_epi16(low, odds, high);
}
// 128 elements: element 4w + (v ^ 1) to quads[v], word w.
static inline void deal_by_four(const BFloat16* from, Isa::I quads[4]) {
  Isa::I even[2], odd[2];
  for (int i = 0; i < 2; ++i)
    split(_mm512_loadu_si512(from + 64 * i), _mm512_loadu_si512(from + 64 * i + 32), even[i], odd[i]);
  split(even[0], even[1], quads[1], quads[3]);
  split(odd[0], odd[1], quads[0], quads[2]);
}

// A slice's lines are too many for L1 beside the slice itself.
static inline void prefetch_l2(const uint8_t* line) { __builtin_prefetch(line, /*rw=*/0, /*locality=*/2); }

}  // namespace
}  // namespace nf4::cpu
