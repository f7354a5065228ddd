// The tiles of the tensor-core kernels, how many blocks of threads of each a multiprocessor holds, and the tile and the
// splits of the contraction by which a product is predicted to take least. Pure arithmetic, as choose.h.
#pragma once

#include <cstdint>

#include "tuning.h"

namespace nf4::cuda {

inline int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one thread block of a tiled kernel owns. linear: M x N of y, K of the contraction a step; linear_dgrad: M x K of
// dX, N of the contraction a step. Each kernel asserts that its shape is this one.
struct Tile {
  int M, N, K;
  int warps;
  int summing;  // warps that share the contraction, whose sums are added
  int shared;   // bytes of a block
  int blocks;   // for which registers are shared out by launch bounds: so many fit into the register file
  int instructions
      [2];  // of a warp's step, 2048 weights: scaled sums, scaled levels (sm_90a, by the report on the SASS)
};
constexpr Tile kLinearTiles[] = {{32, 128, 64, 4, 1, 65536, 3, {247, 396}},
                                 {64, 128, 64, 4, 1, 81920, 2, {327, 445}},
                                 {128, 128, 64, 8, 1, 94208, 1, {322, 441}}};
constexpr Tile kDgradTiles[] = {{16, 128, 128, 8, 4, 86016, 2, {304, 466}},
                                {32, 64, 128, 4, 2, 67584, 3, {350, 509}},
                                {64, 64, 128, 4, 2, 71168, 2, {426, 554}},
                                {128, 32, 256, 8, 1, 82944, 1, {414, 539}}};

struct Tiles {
  const Tile* first;
  int count;
  constexpr const Tile& operator[](int i) const { return first[i]; }
};
template <int kCount>
constexpr Tiles list_of(const Tile (&tiles)[kCount]) {
  return {tiles, kCount};
}
constexpr Tiles tiles_of(bool dgrad) { return dgrad ? list_of(kDgradTiles) : list_of(kLinearTiles); }

// The first tile that holds all of M, else the last.
inline int tile_holding(Tiles tiles, int64_t M) {
  int i = 0;
  while (i + 1 < tiles.count && M > tiles[i].M) ++i;
  return i;
}

// A multiprocessor's shared memory, and its rates a cycle: multiply-adds of mma.sync (bf16, fp32 sums), bytes from the
// L2 and from memory. PREDICTED, NOT MEASURED HERE: from data sheets; those of mma.sync on sm_90 and of the L2 from
// published measurements; sm_100 is taken to be as sm_80 by mma.sync and as sm_90 by the L2.
struct Multiprocessor {
  int arch;  // also for the architectures up to the next row's
  int shared;
  float products, l2, memory;
};
constexpr Multiprocessor kMultiprocessors[] = {
    {80, 164 << 10, 1024, 31, 11},    // A100, 1.41 GHz
    {86, 100 << 10, 256, 15, 6},      // RTX 3090, 1.7 GHz
    {89, 100 << 10, 256, 15, 3},      // RTX 4090, 2.52 GHz
    {90, 228 << 10, 1270, 28, 18.5},  // H200, 1.755 GHz
    {100, 228 << 10, 1024, 28, 26},   // B200, 1.85 GHz
    {120, 100 << 10, 256, 15, 3.7},   // RTX 5090, 2.4 GHz
};
inline const Multiprocessor& multiprocessor_of(int arch) {
  const Multiprocessor* found = &kMultiprocessors[0];
  for (const Multiprocessor& row : kMultiprocessors)
    if (row.arch <= arch) found = &row;
  return *found;
}

// The blocks of threads that are resident at once; the driver keeps 1 KB of shared memory for each.
inline int resident_blocks(const Multiprocessor& mp, const Tile& tile) {
  const int by_shared = mp.shared / (tile.shared + 1024);
  return by_shared < tile.blocks ? by_shared : tile.blocks;
}

// A product as its tiled kernel sees it: out[M, columns], sums over `contraction`.
struct TiledProblem {
  bool dgrad, scales_sums;
  int64_t M, columns, contraction;
  int arch = 0, multiprocessors = 0;

  int64_t steps(const Tile& tile) const { return ceil_quotient(contraction, dgrad ? tile.N : tile.K); }
  int64_t output_tiles(const Tile& tile) const {
    return ceil_quotient(M, tile.M) * ceil_quotient(columns, width(tile));
  }
  int width(const Tile& tile) const { return dgrad ? tile.K : tile.N; }
  // The fp32 sums that blocks leave for the last one of their output tile (split_sums.cuh).
  int64_t partial_sums(const Tile& tile, int64_t splits) const {
    return output_tiles(tile) * splits * tile.M * width(tile);
  }
  // The fewest splits: no warp sums more than 512 terms, or mma's, see docs/design.md, section 7. A term is the sum of
  // 64 k where linear scales sums, and else one mma's 16.
  int64_t least_splits(const Tile& tile) const {
    const int64_t longest = int64_t{tile.summing} * 512 * (scales_sums && !dgrad ? 64 : 16);
    return contraction > longest ? ceil_quotient(contraction, longest) : 1;
  }
};

// Output tiles up to which the last block of a tile to finish adds the splits' sums up (one counter each, arrivals.h);
// past it a second launch does.
constexpr int64_t kMostArrivals = 1024;

// Cycles of a step of a multiprocessor with so many blocks of threads on it: the longest of its products, instructions
// (4 a cycle), bytes from the L2 and bytes from memory, which the tiles along M share; or one block's own products or
// instructions with the latencies that nothing hides.
inline float step_cycles(const Multiprocessor& mp, const TiledProblem& p, const Tile& tile, int resident) {
  constexpr float kExposed = 200;  // of a barrier, a load of words, one of the table and the last mma
  constexpr float kWeightBytes = 0.516f;
  const float weights = float(tile.N) * float(tile.K);
  const float issue = float(tile.warps * tile.instructions[p.scales_sums ? 0 : 1]) / 4;
  const float products = weights * float(tile.M) / mp.products;
  const float packed = weights * kWeightBytes, rest = float(tile.M * (p.dgrad ? tile.N : tile.K)) * 2;
  float block = products > issue ? products : issue;
  const float alone = block + kExposed;
  const float by_l2 = (packed + rest) / mp.l2;
  const float by_memory = packed / float(ceil_quotient(p.M, tile.M)) / mp.memory;
  if (by_l2 > block) block = by_l2;
  if (by_memory > block) block = by_memory;
  const float all = block * float(resident);
  return all > alone ? all : alone;
}

// Cycles of the whole product: waves of blocks that fill the multiprocessors, a last one that does not, and the sum over
// splits. `resident`: blocks of threads of a multiprocessor.
inline float predicted_cycles(const TiledProblem& p, const Tile& tile, int resident, int64_t splits) {
  constexpr float kStart = 1500;  // the first loads, meanwhile the table is built
  constexpr float kArrival = 2000, kLaunch = 4400;
  constexpr float kOwnL2 = 32;  // bytes a cycle of a block that adds alone
  const Multiprocessor& mp = multiprocessor_of(p.arch);
  const int64_t tiles = p.output_tiles(tile), blocks = tiles * splits;
  const float steps = float(ceil_quotient(p.steps(tile), splits));
  const int64_t at_once = int64_t{resident} * p.multiprocessors, rest = blocks % at_once;
  float cycles = float(blocks / at_once) * (kStart + steps * step_cycles(mp, p, tile, resident));
  if (rest > 0) cycles += kStart + steps * step_cycles(mp, p, tile, int(ceil_quotient(rest, p.multiprocessors)));
  if (splits == 1) return cycles;
  const float bytes = 4 * float(tile.M) * float(p.width(tile));
  const float each = float(tiles) / float(p.multiprocessors);
  if (tiles > kMostArrivals) return cycles + kLaunch + 2 * float(splits) * each * bytes / mp.l2;
  return cycles + kArrival + float(splits) * (each > 1 ? each : 1) * bytes / kOwnL2;
}

// The tile and splits that are predicted to take least. More splits, or another tile than the first that holds M, are
// taken where they win by a hundredth.
struct Parts {
  int tile, splits;
  float cycles;
  void take_if_faster(const Parts& other) {
    if (other.cycles < 0.99f * cycles) *this = other;
  }
};

// With this tile: from the splits that sums need to those that fill the machine, and eight more for the last wave.
inline Parts parts_of(const TiledProblem& p, int tile, int resident) {
  constexpr int64_t kMostSplits = 32, kMore = 8;
  const Tile& own = tiles_of(p.dgrad)[tile];
  const int64_t least = p.least_splits(own), steps = p.steps(own), tiles = p.output_tiles(own);
  const int64_t at_once = int64_t{resident} * p.multiprocessors;
  Parts best{tile, int(least), predicted_cycles(p, own, resident, least)};
  int64_t most = at_once / (tiles > 0 ? tiles : 1) + kMore;
  if (most > steps) most = steps;
  if (most > kMostSplits) most = kMostSplits;
  for (int64_t splits = least + 1; splits <= most; ++splits)
    best.take_if_faster({tile, int(splits), predicted_cycles(p, own, resident, splits)});
  return best;
}

// Of the first tile that holds M, the one before it and the one after it, by their measured costs.
inline Parts parts_of(const TiledProblem& p, const Tuning& t) {
  const Tiles tiles = tiles_of(p.dgrad);
  const int holding = tile_holding(tiles, p.M);
  const auto parts = [&](int i) {
    Parts own = parts_of(p, i, int(t.tile_blocks[i]));
    own.cycles *= float(t.tile_cost[i]) / 1000;
    return own;
  };
  Parts best = parts(holding);
  if (holding > 0) best.take_if_faster(parts(holding - 1));
  if (holding + 1 < tiles.count) best.take_if_faster(parts(holding + 1));
  return best;
}

}  // namespace nf4::cuda
