// The blocked product that linear and linear_dgrad share: out[m, c] = sum_d x[m, d] * B[d, c], B decoded tile by tile.
//
//            tile_cols
//          +-----------+     for each column tile (a thread's share of them)
//   depth  | B: decoded|       for each kGemmDepth slice of the contraction
//   slice  | once      |         decode B's slice into the workspace (L1/L2)
//          +-----------+         for each row tile of x: registers acc[tile_rows][2 vectors], run by run,
//   +-----++-----------+           then added to the fp32 tile in the workspace
//   |  x  ||   fp32    |       store the tile, rounded once, with bias
//   +-----++-----------+
//
// x is packed once into row tiles [depth/step][tile_rows][step], so that a register tile reads it in order whatever its
// dtype, stride and tail; B's slice is [depth/step][tile_cols][step]. A decoded slice serves up to kGemmRows rows.
#pragma once

#include "low_rank.h"

namespace nf4 {
namespace {

// fp32 products: step 1.
struct Fp32Core {
  using Element = float;
  static constexpr int kStep = 1;
  // Products summed in a register: chains of 64 left 1 row of 50,000 outside dense fp32's error bound; 6 % slower.
  static constexpr int kRun = 16;
  static Isa::F multiply_add(const Element* x, Isa::F b, Isa::F acc) { return Isa::fma(Isa::set1(*x), b, acc); }
  static Isa::F load_columns(const Element* b) { return Isa::load(b); }
  static void put(Element* out, float a) { *out = a; }
  template <class T>
  static void pack(Element* out, const T* x) {
    *out = to_float(*x);
  }
};

constexpr int kVectors = 2;                   // weight vectors of a register tile
constexpr int kTileCols = kVectors * Isa::L;  // its columns
constexpr int kGroup = 4;                     // column tiles that linear_dgrad decodes together

constexpr int64_t kSliceElements = int64_t(kGemmDepth) * kTileCols;

template <class Core>
constexpr int64_t gemm_workspace_bytes() {
  return kGroup * (kSliceElements * int64_t(sizeof(typename Core::Element)) +
                   int64_t(kGemmRows + Isa::kTileRows) * kTileCols * 4);
}

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Core, class T>
void pack_tiles(const T* x, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                typename Core::Element* panel) {
  using Element = typename Core::Element;
  const int64_t tile_rows = even_tile_rows(rows, Isa::kTileRows), padded = round_up(depth, Core::kStep);
  const int64_t whole = depth / Core::kStep * Core::kStep;
  for (int64_t t = tile_begin; t < tile_end; ++t)
    for (int64_t r = 0; r < tile_rows; ++r) {
      const int64_t m = t * tile_rows + r;
      Element* out = panel + t * tile_rows * padded + r * Core::kStep;
      for (int64_t d = 0; d < padded; d += Core::kStep, out += tile_rows * Core::kStep) {
        if (m < rows && d < whole) {
          Core::pack(out, x + m * depth + d);
        } else {
          for (int s = 0; s < Core::kStep; ++s)
            Core::put(out + s, m < rows && d + s < depth ? to_float(x[m * depth + d + s]) : 0.f);
        }
      }
    }
}

// One depth slice's sum for ROWS x kTileCols elements, which starts (first) or is added to the fp32 tile. It is summed
// in three levels: kRun products in registers, the runs of a slice, and here the slices.
template <class Core, int ROWS>
void register_tile(const typename Core::Element* x, const typename Core::Element* b, int64_t steps, bool first,
                   float* tile) {
  constexpr int64_t kRunSteps = Core::kRun / Core::kStep;
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

// GemmPackFn of the fp32 products.
inline void pack_fp32(const void* x, Dtype dtype, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                      void* panel) {
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    pack_tiles<Fp32Core>(in, rows, depth, tile_begin, tile_end, static_cast<float*>(panel));
  });
}

// The row of a dispatch table for this Isa and Core.
template <class Core>
constexpr GemmKernels describe_gemm(GemmPackFn pack, GemmFn linear, GemmFn linear_dgrad) {
  return {Isa::kTileRows, kTileCols, Core::kStep, int(sizeof(typename Core::Element)), gemm_workspace_bytes<Core>(),
          pack,           linear,    linear_dgrad};
}

template <class Core>
using RegisterTileFn = void (*)(const typename Core::Element*, const typename Core::Element*, int64_t, bool, float*);

template <class Core, int ROWS = Isa::kTileRows>
RegisterTileFn<Core> register_tile_for(int64_t rows) {
  if constexpr (ROWS == 1)
    return register_tile<Core, 1>;
  else
    return rows == ROWS ? register_tile<Core, ROWS> : register_tile_for<Core, ROWS - 1>(rows);
}

// decode(col, cols, d_begin, d_count, slice): B[d_begin.., col..col+kTileCols) for `cols` of columns that exist, zero
// for depth past the end. store(m, col, cols, row): one finished fp32 row of the tile. GROUP column tiles share a depth
// slice. Factor: of LoRA's term, see low_rank.h.
template <class Core, int GROUP, class Factor, class Decode, class Store>
void gemm(const GemmArgs& args, int64_t depth, int64_t columns, int64_t tile_begin, int64_t tile_end, void* workspace,
          Decode decode, Store store) {
  using Element = typename Core::Element;
  const int64_t tile_rows = even_tile_rows(args.rows, Isa::kTileRows), padded = round_up(depth, Core::kStep);
  const int64_t row_tiles = (args.rows + tile_rows - 1) / tile_rows, tile_size = row_tiles * tile_rows * kTileCols;
  const Element* panel = static_cast<const Element*>(args.panel);
  Element* slices = static_cast<Element*>(workspace);
  float* tiles = reinterpret_cast<float*>(slices + GROUP * kSliceElements);
  const auto multiply = register_tile_for<Core>(tile_rows);

  for (int64_t group = tile_begin; group < tile_end; group += GROUP) {
    const int64_t count = tile_end - group < GROUP ? tile_end - group : GROUP;
    for (int64_t d = 0; d == 0 || d < padded; d += kGemmDepth) {  // depth 0 writes zeros
      const int64_t slice = padded - d < kGemmDepth ? padded - d : kGemmDepth;
      for (int64_t g = 0; g < count && slice > 0; ++g) {
        const int64_t col = (group + g) * kTileCols, cols = columns - col < kTileCols ? columns - col : kTileCols;
        decode(col, cols, d, slice, slices + g * kSliceElements);
      }
      for (int64_t t = 0; t < row_tiles; ++t) {
        const Element* x = panel + t * tile_rows * padded + d * tile_rows;
        for (int64_t g = 0; g < count; ++g)
          multiply(x, slices + g * kSliceElements, slice / Core::kStep, d == 0,
                   tiles + g * tile_size + t * tile_rows * kTileCols);
      }
    }
    for (int64_t g = 0; g < count && args.rank > 0; ++g) {
      const int64_t col = (group + g) * kTileCols, cols = columns - col < kTileCols ? columns - col : kTileCols;
      add_low_rank<Factor, kTileCols>(args, col, cols, tiles + g * tile_size);
    }
    for (int64_t m = 0; m < args.rows; ++m)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t col = (group + g) * kTileCols, cols = columns - col < kTileCols ? columns - col : kTileCols;
        store(m, col, cols, tiles + g * tile_size + m * kTileCols);
      }
  }
}

}  // namespace
}  // namespace nf4
