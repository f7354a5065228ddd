// The blocked product that linear and linear_dgrad share: out[m, c] = sum_d x[m, d] * B[d, c], B decoded tile by tile.
//
//            tile_cols
//          +-----------+     for each column tile (a thread's share of them)
//   depth  | B: decoded|       for each kGemmDepth slice of the contraction
//   slice  | once      |         decode B's slice into the workspace (L1/L2)
//          +-----------+         for each row tile of x: the sums of a register tile,
//   +-----++-----------+           then added to the fp32 tile in the workspace
//   |  x  ||   fp32    |       store the tile, rounded once, with bias
//   +-----++-----------+
//
// x is packed once into row tiles, so that a register tile reads it in order whatever its dtype, stride and tail. A
// decoded slice serves up to kGemmRows rows.
//
// A Core is the part that differs: Element of the panel, whose rows are padded to kPanelStep; kStep of the contraction;
// kRows x kCols of a register tile; the Slice that B is decoded into; kGroup column tiles that share a depth
// slice of x; Factor, LoRA's, see low_rank.h; and multiply<ROWS>: one slice's sum for a register tile, which starts (first)
// or is added to the fp32 tile.
// Here are the cores that multiply decoded weights: x is [depth/step][tile_rows][step], a slice [depth/step][cols][step].
#pragma once

#include "low_rank.h"

namespace nf4 {
namespace {

constexpr int kVectors = 2;                   // weight vectors of a register tile
constexpr int kTileCols = kVectors * Isa::L;  // its columns

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Core>
constexpr int64_t gemm_workspace_bytes() {
  return Core::kGroup * int64_t(sizeof(typename Core::Slice) + kGemmRows * Core::kCols * 4);
}

template <class Core, class T>
void pack_tiles(const T* x, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                typename Core::Element* panel) {
  const int64_t tiles = row_tiles(rows, Core::kRows), padded = round_up(depth, Core::kPanelStep);
  const int64_t whole = depth / Core::kStep * Core::kStep;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t first = row_of_tile(t, tiles, rows), tile_rows = row_of_tile(t + 1, tiles, rows) - first;
    for (int64_t r = 0; r < tile_rows; ++r) {
      const T* in = x + (first + r) * depth;
      auto* out = panel + first * padded + r * Core::kStep;
      for (int64_t d = 0; d < padded; d += Core::kStep, out += tile_rows * Core::kStep) {
        if (d < whole) {
          Core::pack(out, in + d);
        } else {
          for (int s = 0; s < Core::kStep; ++s) Core::put(out + s, d + s < depth ? to_float(in[d + s]) : 0.f);
        }
      }
    }
  }
}

// multiply<ROWS> of decoded weights. Sums have three levels: kRun products in registers, the runs of a slice, and here
// the slices.
template <class Core, int ROWS>
void multiply_decoded(const typename Core::Element* x, const typename Core::Element* b, int64_t depth, bool first,
                      float* tile) {
  constexpr int64_t kRunSteps = Core::kRun / Core::kStep;
  const int64_t steps = depth / Core::kStep;
  const auto add_to = [](float* sums, bool start, Isa::F(&acc)[ROWS][kVectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* out = sums + r * kTileCols + v * Isa::L;
        Isa::store(out, start ? acc[r][v] : Isa::add(acc[r][v], Isa::load(out)));
      }
  };
  float slice[ROWS * kTileCols];
  for (int64_t done = 0; done == 0 || done < steps; done += kRunSteps) {
    const int64_t run = steps - done < kRunSteps ? steps - done : kRunSteps;
    Isa::F acc[ROWS][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
    for (int64_t s = 0; s < run; ++s) {
      Isa::F cols[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) cols[v] = Core::load_columns(b + v * Isa::L * Core::kStep);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Core::multiply_add(x + r * Core::kStep, cols[v], acc[r][v]);
      x += ROWS * Core::kStep;
      b += kTileCols * Core::kStep;
    }
    if (steps <= kRunSteps) return add_to(tile, first, acc);
    add_to(slice, done == 0, acc);
  }
  for (int i = 0; i < ROWS * kTileCols; i += Isa::L) {
    const Isa::F sum = Isa::load(slice + i);
    Isa::store(tile + i, first ? sum : Isa::add(sum, Isa::load(tile + i)));
  }
}

// fp32 products.
struct Fp32Core {
  using Element = float;
  using Slice = Element[kGemmDepth * kTileCols];
  static constexpr int kStep = 1, kPanelStep = kStep, kRows = Isa::kTileRows, kCols = kTileCols;
  // Products summed in a register: chains of 64 left 1 row of 50,000 outside dense fp32's error bound; 6 % slower.
  static constexpr int kRun = 16;
  static Isa::F multiply_add(const Element* x, Isa::F b, Isa::F acc) { return Isa::fma(Isa::set1(*x), b, acc); }
  static Isa::F load_columns(const Element* b) { return Isa::load(b); }
  static void put(Element* out, float a) { *out = a; }
  template <class T>
  static void pack(Element* out, const T* x) {
    *out = to_float(*x);
  }
  template <int ROWS>
  static void multiply(const GemmArgs&, const Element* x, const Slice& b, int64_t depth, bool first, float* tile) {
    multiply_decoded<Fp32Core, ROWS>(x, b, depth, first, tile);
  }
};

// GemmPackFn of the fp32 products.
inline void pack_any(const void* x, Dtype dtype, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                     void* panel) {
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    pack_tiles<Fp32Core>(in, rows, depth, tile_begin, tile_end, static_cast<float*>(panel));
  });
}

// What the caller needs to know of a Core.
template <class Core>
constexpr GemmKernel describe_gemm(GemmPackFn pack, GemmFn run) {
  return {Core::kRows, Core::kCols, Core::kPanelStep, int(sizeof(typename Core::Element)), gemm_workspace_bytes<Core>(),
          pack,        run};
}

template <class Core>
using MultiplyFn = void (*)(const GemmArgs&, const typename Core::Element*, const typename Core::Slice&, int64_t, bool,
                            float*);

template <class Core, int ROWS = Core::kRows>
MultiplyFn<Core> multiply_for(int64_t rows) {
  if constexpr (ROWS == 1)  // also for 13 of 12, which is not called
    return Core::template multiply<1>;
  else
    return rows == ROWS ? Core::template multiply<ROWS> : multiply_for<Core, ROWS - 1>(rows);
}

// decode(col, cols, d_begin, d_count, slices): B[d_begin.., col..col+cols) into as many slices as hold `cols`, zero for
// depth past the end. store(m, col, cols, row): one finished fp32 row of a tile.
template <class Core, class Decode, class Store>
void gemm(const GemmArgs& args, int64_t depth, int64_t columns, int64_t tile_begin, int64_t tile_end, void* workspace,
          Decode decode, Store store) {
  const int64_t tiles = row_tiles(args.rows, Core::kRows), padded = round_up(depth, Core::kPanelStep);
  const int64_t end = round_up(depth, Core::kStep), tile_size = args.rows * Core::kCols;
  const auto* panel = static_cast<const typename Core::Element*>(args.panel);
  auto* slices = static_cast<typename Core::Slice*>(workspace);
  float* sums = reinterpret_cast<float*>(slices + Core::kGroup);
  const int64_t few = args.rows / tiles;  // a tile has that many rows or one more
  const MultiplyFn<Core> multiply[2] = {multiply_for<Core>(few), multiply_for<Core>(few + 1)};

  for (int64_t group = tile_begin; group < tile_end; group += Core::kGroup) {
    const int64_t count = tile_end - group < Core::kGroup ? tile_end - group : Core::kGroup;
    const int64_t first_col = group * Core::kCols, left = columns - first_col;
    const int64_t group_cols = left < count * Core::kCols ? left : count * Core::kCols;
    for (int64_t d = 0; d == 0 || d < end; d += kGemmDepth) {  // depth 0 writes zeros
      const int64_t slice = end - d < kGemmDepth ? end - d : kGemmDepth;
      if (slice > 0) decode(first_col, group_cols, d, slice, slices);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = row_of_tile(t, tiles, args.rows), rows = row_of_tile(t + 1, tiles, args.rows) - first;
        for (int64_t g = 0; g < count; ++g)
          multiply[rows - few](args, panel + first * padded + d * rows, slices[g], slice, d == 0,
                               sums + g * tile_size + first * Core::kCols);
      }
    }
    const auto cols_from = [&](int64_t col) { return columns - col < Core::kCols ? columns - col : Core::kCols; };
    for (int64_t g = 0; g < count && args.rank > 0; ++g) {
      const int64_t col = first_col + g * Core::kCols;
      add_low_rank<typename Core::Factor, Core::kCols>(args, col, cols_from(col), sums + g * tile_size);
    }
    for (int64_t m = 0; m < args.rows; ++m)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t col = first_col + g * Core::kCols;
        store(m, col, cols_from(col), sums + g * tile_size + m * Core::kCols);
      }
  }
}

}  // namespace
}  // namespace nf4
