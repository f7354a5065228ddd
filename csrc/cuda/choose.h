// Which kernel multiplies, and in how many parts: pure arithmetic, no torch, no device.
#pragma once

#include "../format.h"

namespace nf4::cuda {

// What can run a product. Their names are those that a caller can force.
enum class Path : int32_t { kAny, kSmall, kTiled, kPanel };
constexpr const char* kPathNames[] = {"any", "small", "tiled", "panel"};

struct Problem {
  bool dgrad;
  Dtype dtype;
  int64_t M, N, K;
  bool whole_codes;  // every 64 consecutive weights of a row share a scale
  bool aligned;      // every pointer to 16 bytes
  int arch;          // 10 * major + minor
  int multiprocessors;
};

struct Choice {
  Path path;
  int splits;  // of the contraction
  const char* reason;
};

constexpr int kSmallRows = 16;

// Most rows of x that the tiled kernels take before dequantizing a panel and calling cuBLAS pays. PREDICTED, NOT
// MEASURED: with F the speed of the tiled kernel and C that of cuBLAS, a panel costs 2.516 bytes a weight of copying, so
// it pays from M = 2.516 / copy / (2 (1 / F - 1 / C)), here to the nearest 32. TB/s and TFLOP/s, by data sheet (sm_90: an
// H200's copy and cuBLAS measured); F is 0.85 of what the tensor cores do by mma.sync or, on sm_90, shared memory lets
// through (linear_tiled.cu), and for dgrad, which issues a quarter more instructions, 0.85 of that again.
// `python benchmarks/gpu.py` prints the measured break-even.
struct Fused {
  int arch;  // this one and those up to the next
  int64_t linear, linear_dgrad;
  const char* why;
};
constexpr Fused kFused[] = {
    {80, 1056, 480, "predicted from copy 1.7 TB/s, cuBLAS 250, tiled 212 TFLOP/s"},
    {86, 544, 256, "predicted from copy 0.85 TB/s, cuBLAS 64, tiled 54 TFLOP/s"},
    {89, 1152, 544, "predicted from copy 0.92 TB/s, cuBLAS 150, tiled 127 TFLOP/s"},
    {90, 352, 256, "predicted from copy 4.3 TB/s, cuBLAS 788, tiled 482 TFLOP/s"},
    {100, 128, 96, "predicted from copy 7 TB/s, cuBLAS 1500, tiled 477 TFLOP/s"},
    {120, 896, 416, "predicted from copy 1.5 TB/s, cuBLAS 190, tiled 161 TFLOP/s"},
};
inline const Fused& fused_of(int arch) {
  const Fused* found = &kFused[0];
  for (const Fused& row : kFused)
    if (row.arch <= arch) found = &row;
  return *found;
}

// What one block of threads of a tensor-core kernel owns. The kernels' own shapes are asserted to be these.
struct Tile {
  int columns, rows;  // of the output
  int step;           // of the contraction, at a time
  int longest;        // contraction that may be summed up in one run: 512 terms or mma's, see DESIGN section 7
  int per_processor;  // blocks that a multiprocessor holds at once, at least
};
constexpr Tile kLinearSmallTile = {32, kSmallRows, 1024, 8 * 512 * 64, 2};
constexpr Tile kLinearTiles[] = {
    {64, 32, 128, 2 * 512 * 64, 1}, {64, 64, 128, 2 * 512 * 64, 1}, {128, 128, 64, 512 * 64, 1}};
constexpr Tile kDgradTiles[] = {
    {128, 16, 128, 4 * 512 * 16, 1}, {128, 64, 64, 2 * 512 * 16, 1}, {256, 128, 32, 512 * 16, 1}};
// The first of a kernel's three tiles that takes M rows at once, else the last.
inline int tile_index(const Tile (&tiles)[3], int64_t M) { return M <= tiles[0].rows ? 0 : M <= tiles[1].rows ? 1 : 2; }

// As many parts as keep all multiprocessors busy, unless adding them up moves more bytes than the weight has.
inline int splits_for(const Tile& tile, int64_t M, int64_t columns, int64_t contraction, int multiprocessors) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks = ceil_div(columns, tile.columns) * ceil_div(M, tile.rows);
  const int64_t busy = int64_t(multiprocessors) * tile.per_processor / (blocks > 0 ? blocks : 1);
  const int64_t steps = ceil_div(contraction, tile.step);
  const int64_t cheap = contraction / (16 * (M > 0 ? M : 1));  // 8 bytes a partial sum against half a byte a weight
  const int64_t least = ceil_div(contraction, tile.longest);
  int64_t splits = busy;
  if (splits > steps) splits = steps;
  if (splits > cheap) splits = cheap;
  if (splits < least) splits = least;
  return int(splits < 1 ? 1 : splits);
}

inline bool takes_tensor_cores(const Problem& p) {
  constexpr int64_t kMost = 1 << 24;  // 128 rows of 2-byte elements are addressed by 32 bits
  const bool contraction = p.dgrad ? p.N % 8 == 0 && p.N < kMost : p.K < kMost;
  return p.dtype != Dtype::kFloat32 && p.whole_codes && p.aligned && contraction;
}
// Why `path` cannot run this; null if it can.
inline const char* obstacle(const Problem& p, Path path) {
  if (path == Path::kAny) return nullptr;
  if (p.dtype == Dtype::kFloat32) return "fp32 is multiplied in true fp32";
  if (path == Path::kPanel) return nullptr;
  if (!takes_tensor_cores(p))
    return "K must be a multiple of 64, block_size at least 64, pointers aligned to 16 bytes, for dgrad N a multiple "
           "of 8";
  if (path == Path::kSmall && (p.dgrad || p.M > kSmallRows)) return "the small kernel is linear's, for at most 16 rows";
  return nullptr;
}

inline int splits_of(const Problem& p, Path path) {
  if (path == Path::kSmall) return splits_for(kLinearSmallTile, p.M, p.N, p.K, p.multiprocessors);
  if (path != Path::kTiled) return 1;
  if (p.dgrad) return splits_for(kDgradTiles[tile_index(kDgradTiles, p.M)], p.M, p.K, p.N, p.multiprocessors);
  return splits_for(kLinearTiles[tile_index(kLinearTiles, p.M)], p.M, p.N, p.K, p.multiprocessors);
}

inline Choice choose(const Problem& p) {
  constexpr int64_t kAnyRows = 64;  // one tile of product_any: with more, it would decode the weight again
  if (p.dtype == Dtype::kFloat32) return {Path::kAny, 1, "fp32: true fp32, no tensor cores"};
  if (!takes_tensor_cores(p)) {
    if (p.M <= kAnyRows) return {Path::kAny, 1, "a shape, block size or alignment without a tensor-core kernel"};
    return {Path::kPanel, 1, "no tensor-core kernel for the shape, and rows enough for cuBLAS"};
  }
  if (!p.dgrad && p.M <= kSmallRows) return {Path::kSmall, splits_of(p, Path::kSmall), "at most 16 rows"};
  const Fused& fused = fused_of(p.arch);
  if (p.M <= (p.dgrad ? fused.linear_dgrad : fused.linear))
    return {Path::kTiled, splits_of(p, Path::kTiled), fused.why};
  return {Path::kPanel, 1, fused.why};
}

// lora_grad: 64 columns by 16 or 32 rows a block, 8 warps of 16 of the depth.
inline int lora_grad_splits(int64_t depth, int64_t rows, int64_t columns, int multiprocessors) {
  const Tile tile = {64, rows <= 16 ? 16 : 32, 128, 8 * 512 * 16, 2};
  return splits_for(tile, rows, columns, depth, multiprocessors);
}

}  // namespace nf4::cuda
