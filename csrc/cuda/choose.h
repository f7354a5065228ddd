// The choice of the kernel that runs a product, of its tile, and of how many ways its contraction is split. Pure
// arithmetic: this file knows neither torch nor a device.
#pragma once

#include "../format.h"
#include "tiles.h"
#include "tuning.h"

namespace nf4::cuda {

// The ways to run a product, and the names by which a caller forces one. dequantize_gemm is no kernel but a loop:
// dequantize a slice of the weight into a workspace, then call the vendor's GEMM (bindings/cuda_dequantize_gemm.cpp).
enum class Path : int32_t { kAny, kSmall, kTiled, kDequantizeGemm };
constexpr const char* kPathNames[] = {"any", "small", "tiled", "dequantize_gemm"};

struct Problem {
  bool dgrad;
  Dtype dtype;
  int64_t M, N, K;
  int64_t experts;   // 0: one weight multiplies all M rows; else the experts' weights share the rows out
  bool scales_sums;  // of the weight
  bool aligned;      // every pointer is a multiple of 16 bytes
  int arch;          // 10 * major + minor
  int multiprocessors;
};

struct Choice {
  Path path;
  int tile;    // of the tiled kernel's: kLinearTiles or kDgradTiles
  int splits;  // parts of the contraction (split-K); 1 for linear_small, see small_blocks
  const char* reason;
};

constexpr int kSmallM = 16;

// M of each weight. For experts it is the mean, as the host does not know the offsets.
inline int64_t m_per_weight(const Problem& p) { return p.experts > 0 ? ceil_quotient(p.M, p.experts) : p.M; }

// The largest M that the tiled kernels take; above it dequantize + GEMM is faster. PREDICTED, NOT MEASURED:
// dequantizing moves 2.516 bytes a weight, so with F the speed of the tiled kernel and C that of cuBLAS the break-even
// is M = 2.516 / copy / (2 (1 / F - 1 / C)), here rounded to the nearest 32. TB/s and TFLOP/s are from data sheets
// (sm_90: an H200's copy and cuBLAS, measured). F is 0.85 of what the tensor cores do by mma.sync or, on sm_90, of what
// shared memory delivers (linear_tiled.cuh); dgrad issues a quarter more instructions and gets 0.85 of that again.
// `python -m benchmarks.gpu.run` prints the measured break-even.
struct Fused {
  int arch;  // also for the architectures up to the next row's
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

// What a thread block of the grouped small kernel owns, as a Tile of tiles.h.
struct SmallTile {
  int M, N, K;
  int warps;                      // that share the contraction, whose sums are added
  int blocks_per_multiprocessor;  // resident at once, at least
};
constexpr SmallTile kGroupedSmallTile = {kSmallM, 32, 1024, 8, 2};
inline int64_t longest_small_sum(bool scales_sums) {
  return int64_t{kGroupedSmallTile.warps} * 512 * (scales_sums ? 64 : 16);
}

static_assert(tiles_of(false).count <= kMostTiles && tiles_of(true).count <= kMostTiles, "a Tuning has room for each");

// The problem of the tiled kernels.
inline TiledProblem tiled_problem(const Problem& p) {
  return {p.dgrad, p.scales_sums, p.M, p.dgrad ? p.K : p.N, p.dgrad ? p.N : p.K, p.arch, p.multiprocessors};
}

// Enough splits to fill the machine, but no more than there are steps, and not so many that the partial sums (8 bytes
// each, `partial_rows` rows of them) outweigh the weight (half a byte each). No sum is longer than `longest_sum`.
inline int splits_for(int64_t output_tiles, int64_t resident_blocks, int64_t contraction, int64_t step,
                      int64_t longest_sum, int64_t partial_rows) {
  const int64_t busy = resident_blocks / (output_tiles > 0 ? output_tiles : 1);
  const int64_t steps = ceil_quotient(contraction, step);
  const int64_t cheap = contraction / (16 * (partial_rows > 0 ? partial_rows : 1));
  const int64_t least = ceil_quotient(contraction, longest_sum);
  int64_t splits = busy;
  if (splits > steps) splits = steps;
  if (splits > cheap) splits = cheap;
  if (splits < least) splits = least;
  return int(splits < 1 ? 1 : splits);
}

// The same for experts, in mean rows an expert. torch's grouped product is native on sm_90 and sm_100 alone; elsewhere
// it makes the host wait. PREDICTED, NOT MEASURED, from the numbers above with torch's product at 0.85 of cuBLAS and
// its result copied into out: M = 2.516 / copy / (2 / F - 2 / C - 4 / (copy * 2048)) at a contraction of 2048.
constexpr Fused kGroupedFused[] = {
    {90, 832, 416, "experts, predicted from copy 4.3 TB/s, grouped product 670, tiled 482 TFLOP/s"},
    {100, 160, 128, "experts, predicted from copy 7 TB/s, grouped product 1275, tiled 477 TFLOP/s"},
};
inline const Fused* grouped_fused_of(int arch) {
  for (const Fused& row : kGroupedFused)
    if (row.arch / 10 == arch / 10) return &row;
  return nullptr;
}

// What is measured on a card replaces this (tuning.h).
inline Tuning predicted(const Problem& p) {
  const Fused* grouped = p.experts > 0 ? grouped_fused_of(p.arch) : nullptr;
  const Fused& fused = grouped ? *grouped : fused_of(p.arch);
  const Tiles tiles = tiles_of(p.dgrad);
  Tuning t{};
  t.small = p.dgrad ? 0 : kSmallM;
  t.tiled = p.dgrad ? fused.linear_dgrad : fused.linear;
  for (int i = 0; i < tiles.count; ++i) {
    t.tile_rows[i] = tiles[i].M;
    t.tile_cost[i] = 1000;
    t.tile_blocks[i] = resident_blocks(multiprocessor_of(p.arch), tiles[i]);
  }
  t.why_small = "predicted: at most 16 rows";
  t.why = fused.why;
  return t;
}

inline bool can_use_tensor_cores(const Problem& p) {
  constexpr int64_t kMost = 1 << 24;                 // a kernel addresses 128 rows of 2-byte elements by 32 bits
  constexpr int64_t kMostBlocks = int64_t{1} << 32;  // the kernels number blocks of 64 or 16 weights by 32 bits
  const bool blocks = p.N * (p.K / (p.scales_sums ? 64 : 16)) < kMostBlocks;
  const bool sizes = p.dgrad ? p.N % 8 == 0 && p.N < kMost : p.K < kMost;
  return p.dtype != Dtype::kFloat32 && p.K > 0 && p.K % 64 == 0 && p.aligned && blocks && sizes;
}
// Why `path` cannot run this problem; null if it can.
inline const char* obstacle(const Problem& p, Path path) {
  if (path == Path::kAny) return nullptr;
  if (p.dtype == Dtype::kFloat32) return "fp32 is multiplied in true fp32";
  if (path == Path::kDequantizeGemm && p.experts == 0) return nullptr;
  if (path == Path::kDequantizeGemm) {
    const bool sizes = p.N % 8 == 0 && p.aligned && p.experts < 1 << 16;
    return p.dtype == Dtype::kBFloat16 && grouped_fused_of(p.arch) != nullptr && sizes
               ? nullptr
               : "dequantize_gemm of experts needs bf16 on sm_90 or sm_100, N a multiple of 8, pointers aligned to 16 "
                 "bytes";
  }
  if (!can_use_tensor_cores(p))
    return "K must be a multiple of 64, pointers aligned to 16 bytes, for dgrad N a multiple of 8";
  if (path == Path::kSmall && (p.dgrad || (p.M > kSmallM && p.experts == 0)))
    return "the small kernel is linear's, for at most 16 rows";
  return nullptr;
}

// The tile that is predicted to take least; for experts the first that takes M rows, else the last.
inline int tile_for(const Problem& p, const Tuning& t) {
  if (p.experts == 0) return parts_of(tiled_problem(p), t).tile;
  int tile = 0;
  while (tile + 1 < tiles_of(p.dgrad).count && m_per_weight(p) > t.tile_rows[tile]) ++tile;
  return tile;
}

// The parts that the contraction may have for small, or for this tile of tiled: no sum is too long, and each part can
// have a step. (1, 1) for the other kernels.
struct SplitLimits {
  int least, most;
};
inline SplitLimits split_limits(const Problem& p, Path path, int tile) {
  if (path == Path::kTiled) {
    const TiledProblem tiled = tiled_problem(p);
    const Tile& own = tiles_of(p.dgrad)[tile];
    const int64_t steps = tiled.steps(own);
    constexpr int64_t kMostInGrid = 65535;  // in z
    return {int(tiled.least_splits(own)), int(steps < 1 ? 1 : steps < kMostInGrid ? steps : kMostInGrid)};
  }
  if (path != Path::kSmall || p.experts == 0) return {1, 1};
  const int64_t steps = ceil_quotient(p.K, kGroupedSmallTile.K);
  const int64_t least = ceil_quotient(p.K, longest_small_sum(p.scales_sums));
  return {int(least < 1 ? 1 : least), int(steps < 1 ? 1 : steps)};
}

// Experts fill the machine unsplit (grouped_linear.cu): they are split where a sum would be too long, and nowhere else.
inline int splits_of(const Problem& p, const Tuning& t, Path path, int tile) {
  if (path != Path::kSmall && path != Path::kTiled) return 1;
  if (p.experts > 0) return split_limits(p, path, tile).least;
  if (path == Path::kTiled) return parts_of(tiled_problem(p), tile, int(t.tile_blocks[tile])).splits;
  return 1;  // small_blocks share the contraction out
}

// Why `path` cannot run this problem by this tile (-1: its own choice) in so many splits (0: its own choice); null if it
// can.
inline const char* obstacle(const Problem& p, const Tuning& t, Path path, int tile, int splits) {
  if (const char* why = obstacle(p, path)) return why;
  if (tile >= 0 && path != Path::kTiled) return "tiled alone has tiles to choose from";
  if (tile >= tiles_of(p.dgrad).count) return "it has fewer tiles";
  if (splits == 0) return nullptr;
  if (path != Path::kSmall && path != Path::kTiled) return "small and tiled alone are split";
  const SplitLimits limits = split_limits(p, path, tile < 0 ? tile_for(p, t) : tile);
  if (splits < limits.least) return "a sum would be too long without more splits";
  return splits > limits.most ? "a split would have no step of the contraction" : nullptr;
}

inline Choice choice_of(const Problem& p, const Tuning& t, Path path, const char* reason) {
  const int tile = path == Path::kTiled ? tile_for(p, t) : 0;
  return {path, tile, splits_of(p, t, path, tile), reason};
}
// What `obstacle` has passed; `path` alone is not left open.
inline Choice forced_choice(const Problem& p, const Tuning& t, Path path, int tile, int splits) {
  Choice choice = choice_of(p, t, path, "forced");
  if (tile >= 0) choice = {path, tile, splits_of(p, t, path, tile), choice.reason};
  if (splits > 0) choice.splits = splits;
  return choice;
}

// linear_small of one weight shares units of 32 n (M > 8: 64 n) by 128 k out to one thread block a multiprocessor, but
// no fewer to a block than eight. Where tiles can be dealt out whole to 15 of 16 multiprocessors or more, they are: a
// cut tile's parts wait for each other, about a microsecond. The workspace for cut tiles: two parts a block.
constexpr int kSmallUnitK = 128, kSmallUnits = 8, kSmallMostBlocks = 1024;
NF4_HOST_DEVICE constexpr int small_tile_n(int64_t M) { return M <= 8 ? 32 : 64; }
inline int small_blocks(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const int64_t tiles = ceil_quotient(N, small_tile_n(M)), depth = ceil_quotient(K, kSmallUnitK);
  const int64_t machine = multiprocessors < kSmallMostBlocks ? multiprocessors : kSmallMostBlocks;
  const int64_t most = ceil_quotient(tiles * depth, kSmallUnits);
  if (most < machine) return int(most);
  for (int64_t blocks = machine; blocks * 16 >= machine * 15; --blocks)
    if (tiles % blocks == 0) return int(blocks);
  return int(machine);
}
// Whether the share of some block may end within a tile.
inline bool small_is_cut(int64_t M, int64_t N, int blocks) { return ceil_quotient(N, small_tile_n(M)) % blocks != 0; }
inline int64_t small_partial_floats(int64_t M, int blocks) { return 2 * int64_t{blocks} * M * small_tile_n(M); }

constexpr int64_t kAnyM = 64;  // one tile of product_any, which decodes the weight once more for each further tile

inline Choice choose(const Problem& p, const Tuning& t) {
  if (p.dtype == Dtype::kFloat32) return choice_of(p, t, Path::kAny, "fp32: true fp32, no tensor cores");
  const bool has_gemm = obstacle(p, Path::kDequantizeGemm) == nullptr;
  if (!can_use_tensor_cores(p)) {
    if (has_gemm && m_per_weight(p) > kAnyM)
      return choice_of(p, t, Path::kDequantizeGemm, "no tensor-core kernel for the shape, and rows enough for a GEMM");
    return choice_of(p, t, Path::kAny, "a shape or alignment without a tensor-core kernel");
  }
  if (m_per_weight(p) <= t.small && obstacle(p, Path::kSmall) == nullptr)
    return choice_of(p, t, Path::kSmall, t.why_small);
  if (!has_gemm) return choice_of(p, t, Path::kTiled, "torch has no product of experts for this");
  return choice_of(p, t, m_per_weight(p) <= t.tiled ? Path::kTiled : Path::kDequantizeGemm, t.why);
}

// lora_grad sums over M: a block owns 16 or 32 ranks by 64 columns, and its 8 warps take 16 of M each at a time.
inline int lora_grad_splits(int64_t M, int64_t rank, int64_t columns, int multiprocessors) {
  const int64_t output_tiles = ceil_quotient(rank, rank <= 16 ? 16 : 32) * ceil_quotient(columns, 64);
  return splits_for(output_tiles, 2 * multiprocessors, M, 8 * 16, 8 * 512 * 16, rank);
}

}  // namespace nf4::cuda
