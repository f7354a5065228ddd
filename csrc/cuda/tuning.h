// What a measurement on a card replaces of choose.h's predictions, for one op. Parameters, not shapes: the rows up to
// which each kernel and tile runs, and how many blocks split-K is to fill. `nf4kernels tune` finds them.
#pragma once

#include <cstdint>

namespace nf4::cuda {

constexpr int kMostTiles = 6;

// M is that of each weight, for experts the mean.
struct Tuning {
  int64_t small;                    // the largest M of small; 0: it never runs
  int64_t small_blocks;             // of each multiprocessor, that the splits of small fill
  int64_t tiled;                    // the largest M of tiled; above it dequantize_gemm runs, where it can
  int64_t tile_rows[kMostTiles];    // the largest M of each tile of tiled, ascending; the last takes all the rest
  int64_t tile_blocks[kMostTiles];  // as small_blocks
  const char *why_small, *why;
};

}  // namespace nf4::cuda
