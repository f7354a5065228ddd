// What a measurement on a card replaces of choose.h's and tiles.h's predictions, for one op. Parameters, not shapes: the
// rows up to which each kernel runs, and of each tile how far the prediction is off. `nf4kernels tune` finds them.
#pragma once

#include <cstdint>

namespace nf4::cuda {

constexpr int kMostTiles = 6;

// M is that of each weight, for experts the mean.
struct Tuning {
  int64_t small;  // the largest M of small; 0: it never runs
  int64_t tiled;  // the largest M of tiled; above it dequantize_gemm runs, where it can
  // Of each tile of tiled. For experts: its largest M, ascending; the last one takes all the rest. For one weight: its
  // time, in thousandths of what tiles.h predicts, by which the tiles are compared; and the blocks of threads that are
  // taken to be resident on a multiprocessor, which its splits are to fill.
  int64_t tile_rows[kMostTiles], tile_cost[kMostTiles], tile_blocks[kMostTiles];
  const char *why_small, *why;
};

}  // namespace nf4::cuda
