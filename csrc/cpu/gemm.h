// The blocked product that linear and linear_dgrad share: out[m, c] = sum_d x[m, d] * B[d, c], B decoded tile by tile.
// Read first: kernels.h, for M, C and D.
//
//   pack        x into a panel, once for up to kPassM = 512 rows                           all threads
//   for each C tile of kTileC columns of out                                               a thread's share
//     for each slice of kSliceD = 256 of D
//       decode    B[slice, C tile] into a Slice: once for all M, into L1 or L2
//       for each M tile of up to kTileM rows of x
//         multiply    the Slice, by a register tile of fp32 sums; add those to the fp32 tile [M, kTileC] in L2
//     finish      add the LoRA term to the fp32 tile (lora_term.h), then store its rows, rounded once, with bias
//
//   The register tile of decoded weights at one d; L lanes a register, acc[r][v] += x[r, d] * B[d, v]
//
//                                  B[d, 0 .. L-1]   B[d, L .. 2L-1]     kVectors = 2 registers
//     x[0, d], broadcast             acc[0][0]         acc[0][1]
//     x[1, d]                        acc[1][0]         acc[1][1]        kTileM = 12 AVX-512, 6 AVX2, 5 NEON, 4 scalar
//        ...                            ...               ...
//
//   The panel: M tile after M tile, each [D / kStep][its rows][kStep], so that a register tile reads it in order,
//   whatever the dtype and tail of x. The M tiles have at most kTileM rows, and differ by at most one.
//
//     d = 0 .. kStep-1           d = kStep .. 2 kStep-1                    M tile 1
//     | m 0 | m 1 | .. | m 11 || m 0 | m 1 | .. | m 11 || ... zero past D ||| m 12 | m 13 | ...
//
// A Core is what differs between the products:
//
//   Element, kStep, kPanelStep   of the panel: its type; how many d are multiplied at once; D is padded to kPanelStep
//   kTileM x kTileC              the register tile
//   Slice                        what B is decoded into; a Slice of decoded weights is [D / kStep][kTileC][kStep]
//   kGroup                       C tiles that are decoded together and share a slice of x
//   Factor                       how lora_term.h reads LoRA's other factor
//   multiply<TILE_M>             the sums of one Slice for a register tile; is_first: they start the fp32 tile
//
// The cores that multiply decoded weights are here and in gemm_avx512_bf16.h; those that look codes up in registers are
// in linear_codes.h and linear_dgrad_codes.h, which have panels of their own.
#pragma once

#include "lora_term.h"
#include "rows.h"

namespace nf4::cpu {
namespace {

constexpr int kVectors = 2;                       // weight registers of a register tile of decoded weights
constexpr int kDecodedTileC = kVectors * Isa::L;  // its columns

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Core>
constexpr int64_t gemm_workspace_bytes() {
  return Core::kGroup * int64_t(sizeof(typename Core::Slice) + kPassM * Core::kTileC * 4);
}

// The first columns of an M tile whose steps are 32-bit words; returns how many. The last words are left, as the store
// of L lanes would go past the tile. Word by word 512x1536 took, in us, 230 in fp32 and 976 in fp16 with AVX2, 373 in
// fp32 with AVX-512, instead of 81, 101 and 98 (one Zen 4 core).
template <class Core, class T>
int64_t pack_words(const T* x, int64_t m_count, int64_t D, typename Core::Element* out) {
  using Element = typename Core::Element;
  constexpr bool kSame = Same<T, Element>::value;
  constexpr int64_t kColumns = 64 * Core::kStep;  // converted at once, by way of the L1
  const int64_t words = D / Core::kStep - ceil_div(Isa::L - m_count, m_count);
  const int64_t columns = words < 4 ? 0 : words / 4 * 4 * Core::kStep;
  alignas(64) Element converted[kSame ? 1 : Core::kTileM][kColumns];
  for (int64_t d = 0; d < columns; d += kColumns) {
    const int64_t count = columns - d < kColumns ? columns - d : kColumns;
    const uint8_t* rows[Isa::L];
    for (int64_t r = 0; r < m_count; ++r) {
      const T* row = x + r * D + d;
      if constexpr (!kSame) convert_row(row, count, count, converted[r]);
      rows[r] = reinterpret_cast<const uint8_t*>(kSame ? static_cast<const void*>(row) : converted[r]);
    }
    for (int64_t r = m_count; r < Isa::L; ++r) rows[r] = rows[0];
    transpose_words(rows, count / Core::kStep, m_count * 4, out + d * m_count);
  }
  return columns;
}

template <class Core, class T>
void pack_tiles(const T* x, int64_t M, int64_t D, int64_t tile_begin, int64_t tile_end, typename Core::Element* panel) {
  constexpr bool kHasWords = Core::kStep * sizeof(typename Core::Element) == 4;
  const int64_t tiles = m_tiles(M, Core::kTileM), padded = round_up(D, Core::kPanelStep);
  const int64_t whole = D / Core::kStep * Core::kStep;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t first = first_m(t, tiles, M), m_count = first_m(t + 1, tiles, M) - first;
    int64_t begin = 0;
    if constexpr (kHasWords) {
      if (m_count == 1) {
        convert_row(x + first * D, D, padded, panel + first * padded);
        continue;
      }
      begin = pack_words<Core>(x + first * D, m_count, D, panel + first * padded);
    }
    for (int64_t r = 0; r < m_count; ++r) {
      const T* in = x + (first + r) * D;
      auto* out = panel + first * padded + begin * m_count + r * Core::kStep;
      for (int64_t d = begin; d < padded; d += Core::kStep, out += m_count * Core::kStep) {
        if (d < whole) {
          Core::pack(out, in + d);
        } else {
          for (int s = 0; s < Core::kStep; ++s) Core::put(out + s, d + s < D ? to_float(in[d + s]) : 0.f);
        }
      }
    }
  }
}

// multiply<TILE_M> of decoded weights. Sums have three levels: kRun products in a register, the runs of a slice in
// slice_sums, and the slices in the fp32 tile.
template <class Core, int TILE_M>
void multiply_decoded(const typename Core::Element* x, const typename Core::Element* b, int64_t d_count, bool is_first,
                      float* tile) {
  constexpr int64_t kRunSteps = Core::kRun / Core::kStep;
  constexpr int kTileC = Core::kTileC;
  const int64_t steps = d_count / Core::kStep;
  const auto add_to = [](float* sums, bool is_start, Isa::F(&acc)[TILE_M][kVectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* out = sums + r * kTileC + v * Isa::L;
        Isa::store(out, is_start ? acc[r][v] : Isa::add(acc[r][v], Isa::load(out)));
      }
  };
  float slice_sums[TILE_M * kTileC];
  for (int64_t done = 0; done == 0 || done < steps; done += kRunSteps) {
    const int64_t run = steps - done < kRunSteps ? steps - done : kRunSteps;
    Isa::F acc[TILE_M][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
    for (int64_t s = 0; s < run; ++s) {
      Isa::F weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = Core::load_weights(b + v * Isa::L * Core::kStep);
#pragma GCC unroll 12
      for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Core::multiply_add(x + r * Core::kStep, weights[v], acc[r][v]);
      x += TILE_M * Core::kStep;
      b += kTileC * Core::kStep;
    }
    if (steps <= kRunSteps) return add_to(tile, is_first, acc);
    add_to(slice_sums, done == 0, acc);
  }
  for (int i = 0; i < TILE_M * kTileC; i += Isa::L) {
    const Isa::F sum = Isa::load(slice_sums + i);
    Isa::store(tile + i, is_first ? sum : Isa::add(sum, Isa::load(tile + i)));
  }
}

// fp32 products.
struct Fp32Core {
  using Element = float;
  using Slice = Element[kSliceD * kDecodedTileC];
  static constexpr int kStep = 1, kPanelStep = kStep, kTileM = Isa::kTileM, kTileC = kDecodedTileC;
  // Products summed in a register: chains of 64 left 1 row of 50,000 outside dense fp32's error bound; 6 % slower.
  static constexpr int kRun = 16;
  static Isa::F multiply_add(const Element* x, Isa::F b, Isa::F acc) { return Isa::fma(Isa::set1(*x), b, acc); }
  static Isa::F load_weights(const Element* b) { return Isa::load(b); }
  static void put(Element* out, float a) { *out = a; }
  template <class T>
  static void pack(Element* out, const T* x) {
    *out = to_float(*x);
  }
  template <int TILE_M>
  static void multiply(const GemmArgs&, const Element* x, const Slice& b, int64_t d_count, bool is_first, float* tile) {
    multiply_decoded<Fp32Core, TILE_M>(x, b, d_count, is_first, tile);
  }
};

// GemmPackFn of the fp32 products.
inline void pack_fp32(const void* x, Dtype dtype, int64_t M, int64_t D, int64_t tile_begin, int64_t tile_end,
                      void* panel) {
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    pack_tiles<Fp32Core>(in, M, D, tile_begin, tile_end, static_cast<float*>(panel));
  });
}

// What the caller needs to know of a Core.
template <class Core>
constexpr GemmKernel describe_gemm(GemmPackFn pack, GemmFn run) {
  return {/*tile_m=*/Core::kTileM,
          /*tile_c=*/Core::kTileC,
          /*step_d=*/Core::kPanelStep,
          int(sizeof(typename Core::Element)),
          gemm_workspace_bytes<Core>(),
          pack,
          run};
}

template <class Core>
using MultiplyFn = void (*)(const GemmArgs&, const typename Core::Element*, const typename Core::Slice&,
                            int64_t d_count, bool is_first, float*);

template <class Core, int TILE_M = Core::kTileM>
MultiplyFn<Core> multiply_for(int64_t m_count) {
  if constexpr (TILE_M == 1)  // also for 13 of 12, which is not called
    return Core::template multiply<1>;
  else
    return m_count == TILE_M ? Core::template multiply<TILE_M> : multiply_for<Core, TILE_M - 1>(m_count);
}

// decode(c, c_count, d, d_count, slices): B[d .. d + d_count, c .. c + c_count] into as many slices as hold c_count
// columns, zero for d past the end. store(m, c, c_count, row): one finished fp32 row of a tile.
template <class Core, class Decode, class Store>
void gemm(const GemmArgs& args, int64_t D, int64_t C, int64_t tile_begin, int64_t tile_end, void* workspace,
          Decode decode, Store store) {
  const int64_t tiles = m_tiles(args.M, Core::kTileM), padded = round_up(D, Core::kPanelStep);
  const int64_t d_end = round_up(D, Core::kStep), tile_size = args.M * Core::kTileC;
  const auto* panel = static_cast<const typename Core::Element*>(args.panel);
  auto* slices = static_cast<typename Core::Slice*>(workspace);
  float* sums = reinterpret_cast<float*>(slices + Core::kGroup);
  const int64_t few = args.M / tiles;  // an M tile has that many rows or one more
  const MultiplyFn<Core> multiply[2] = {multiply_for<Core>(few), multiply_for<Core>(few + 1)};

  for (int64_t group = tile_begin; group < tile_end; group += Core::kGroup) {
    const int64_t count = tile_end - group < Core::kGroup ? tile_end - group : Core::kGroup;
    const int64_t first_c = group * Core::kTileC, left = C - first_c;
    const int64_t group_c = left < count * Core::kTileC ? left : count * Core::kTileC;
    for (int64_t d = 0; d == 0 || d < d_end; d += kSliceD) {  // D = 0 writes zeros
      const int64_t d_count = d_end - d < kSliceD ? d_end - d : kSliceD;
      if (d_count > 0) decode(first_c, group_c, d, d_count, slices);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = first_m(t, tiles, args.M), m_count = first_m(t + 1, tiles, args.M) - first;
        for (int64_t g = 0; g < count; ++g)
          multiply[m_count - few](args, panel + first * padded + d * m_count, slices[g], d_count, d == 0,
                                  sums + g * tile_size + first * Core::kTileC);
      }
    }
    // Finish: the fp32 tiles of the group are complete.
    const auto c_count_from = [&](int64_t c) { return C - c < Core::kTileC ? C - c : Core::kTileC; };
    for (int64_t g = 0; g < count && args.rank > 0; ++g) {
      const int64_t c = first_c + g * Core::kTileC;
      add_lora_term<typename Core::Factor, Core::kTileC>(args, c, c_count_from(c), sums + g * tile_size);
    }
    for (int64_t m = 0; m < args.M; ++m)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t c = first_c + g * Core::kTileC;
        store(m, c, c_count_from(c), sums + g * tile_size + m * Core::kTileC);
      }
  }
}

}  // namespace
}  // namespace nf4::cpu
