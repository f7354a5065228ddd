// linear_dgrad in bf16, codes decoded in registers: dX[m, k] = sum_n (dY[m, n] * scale[n, k / 64]) * code[n, k]
//
// Read first   gemm.h, then codes_avx512_bf16.h.
// Work split   K tiles of 64 k, which share a scale in each row of W. The caller splits them over threads.
// Inner loop   A register holds 64 k of rows n and n+1 of W: 4 x (shift, vpermw) give the pairs (n, n+1) of 16 k each,
//              each x up to 6 rows of dY, broadcast.
// The trick    A scale belongs to one n, which is summed over, so it goes into dY: once per 64 k, rounded to bf16 as a
//              weight would be. Codes are looked up unscaled, straight into vdpbf16ps, as linear_codes.h does.
// Rejected     Decoding to scaled bf16 in L1 (linear_dgrad.h): as long as the products of 16 rows of dY (4096x4096,
//              M = 16: 4.5 against 3.2 ms, M = 128: both 22, M = 256: 41 against 44; one core of a Zen 4 EPYC).
// Flops        2*M*N*K at one vdpbf16ps of 64 a cycle, and 4 instructions in 64 for the scaling of dY.
// Needs        has_whole_codes; |dY * scale| in fp32's range.
//
//   lane j of slice.codes[n / 2], 32 bits         codes k = 4j .. 4j+3 of two rows of W
//
//     nibble        7  6  5  4 | 3  2  1  0
//     holds 4j +    2  3  0  1 | 2  3  0  1
//                   row n + 1  | row n
//
//   nibble v of each word: vector v of the tile, acc[m][v]   v = 0   1    2     3
//   lane j holds dX at k = 4j + (v ^ 1)                        4j+1  4j  4j+3  4j+2
#pragma once

#include "codes_avx512_bf16.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

struct NibbleByNibble {  // the order of k above
  static constexpr int first_k(int vector) { return vector ^ 1; }
};

// Panels are [M tile][slice of N][m][kSliceD], padded with zeros.
struct DgradCodes {
  using Element = BFloat16;
  using Factor = LoraA<NibbleByNibble>;
  static constexpr int kNibbles = 4;  // of a word: as many weight vectors
  static constexpr int kStep = 2, kPanelStep = kSliceD, kTileM = 6, kTileC = kNibbles * Isa::L, kGroup = 2;
  struct Slice {
    Isa::I codes[kSliceD / 2];
    alignas(64) float scales[kSliceD];
    const uint8_t* ahead;  // the slice after this one, in its first row of W
    int64_t row_bytes;     // to its next row
  };

  template <int TILE_M>
  static void multiply(const GemmArgs& args, const Element* dy, const Slice& slice, int64_t n_count, bool is_first,
                       float* tile) {
    alignas(64) Element scaled[TILE_M][kSliceD];
    for (int r = 0; r < TILE_M; ++r)
      for (int64_t n = 0; n < n_count; n += 2 * Isa::L) {
        const Element* from = dy + r * kSliceD + n;
        const Isa::F low = Isa::mul(Isa::load(from), Isa::load(slice.scales + n));
        const Isa::F high = Isa::mul(Isa::load(from + Isa::L), Isa::load(slice.scales + n + Isa::L));
        _mm512_store_si512(scaled[r] + n, (Isa::I)_mm512_cvtne2ps_pbh(high, low));
      }

    const Isa::I table = load_code_table(args.bf16_code);
    Isa::F acc[TILE_M][kNibbles];
#pragma GCC unroll 6
    for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kNibbles; ++v) acc[r][v] = Isa::zero();
    for (int64_t pair = 0; pair < n_count / 2; ++pair) {
      __builtin_prefetch(slice.ahead + 2 * pair * slice.row_bytes);
      __builtin_prefetch(slice.ahead + (2 * pair + 1) * slice.row_bytes);
      const Isa::I codes = slice.codes[pair];
      const __m512bh values[kNibbles] = {code_values<0>(table, codes), code_values<1>(table, codes),
                                         code_values<2>(table, codes), code_values<3>(table, codes)};
#pragma GCC unroll 6
      for (int r = 0; r < TILE_M; ++r) {
        const auto dy_pair = (__m512bh)Isa::broadcast_pair(scaled[r] + 2 * pair);
#pragma GCC unroll 4
        for (int v = 0; v < kNibbles; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], values[v], dy_pair);
      }
    }
    for (int r = 0; r < TILE_M; ++r)
      for (int v = 0; v < kNibbles; ++v) {
        float* out = tile + r * kTileC + v * Isa::L;
        Isa::store(out, is_first ? acc[r][v] : Isa::add(acc[r][v], Isa::load(out)));
      }
  }
};

void dgrad_codes_pack(const void* dy, Dtype, int64_t M, int64_t N, int64_t tile_begin, int64_t tile_end, void* panel) {
  const int64_t tiles = m_tiles(M, DgradCodes::kTileM), padded = round_up(N, kSliceD);
  const auto* in = static_cast<const BFloat16*>(dy);
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t first = first_m(t, tiles, M), end = first_m(t + 1, tiles, M);
    auto* out = static_cast<BFloat16*>(panel) + first * padded;
    for (int64_t n = 0; n < N; n += kSliceD)
      for (int64_t m = first; m < end; ++m, out += kSliceD) {
        const int64_t count = N - n < kSliceD ? N - n : kSliceD;
        std::memset(static_cast<void*>(out + count), 0, size_t(kSliceD - count) * sizeof *out);
        std::memcpy(static_cast<void*>(out), in + m * N + n, size_t(count) * sizeof *out);
      }
  }
}

// A finished row of the tile, in the order of k.
static inline void put_in_order(const float* row, float* natural) {
  const auto vector = [&](int v) { return Isa::load(row + v * Isa::L); };
  const Isa::I low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  float pairs[2][2 * Isa::L];  // k 4j and 4j+1, k 4j+2 and 4j+3
  Isa::store_pairs(pairs[0], vector(1), vector(0));
  Isa::store_pairs(pairs[1], vector(3), vector(2));
  for (int half = 0; half < 2; ++half) {
    const __m512d a = _mm512_castps_pd(Isa::load(pairs[0] + half * Isa::L));
    const __m512d b = _mm512_castps_pd(Isa::load(pairs[1] + half * Isa::L));
    float* out = natural + half * 2 * Isa::L;
    Isa::store(out, _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b)));
    Isa::store(out + Isa::L, _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b)));
  }
}

// The scales at k of rows [n, n + kSliceD) of W; past n_count, where dY is zero, of the last row or zero.
static inline void decode_scales(const GemmArgs& args, int64_t n, int64_t n_count, int64_t k, float* scales) {
  const Weight& w = args.weight;
  const Isa::F code_scale = Isa::set1(args.bf16_code.scale);
  for (int64_t i = 0; i < kSliceD; i += Isa::L) {
    if (i >= n_count) {
      Isa::store(scales + i, Isa::zero());
      continue;
    }
    const int here = n_count - i < Isa::L ? int(n_count - i) : Isa::L;
    const auto block = [&](int r) { return ((n + i + r) * w.K + k) >> w.block_shift; };
    const Isa::F values = Isa::mul(gather_scales(w, here, block, gather_superblocks(w, here, block)), code_scale);
    Isa::store(scales + i, values);
  }
}

void linear_dgrad_codes(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const Isa::I words = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const Isa::I next_words = _mm512_add_epi16(words, _mm512_set1_epi16(16));
  constexpr int kTileBytes = DgradCodes::kTileC / 2;
  // One load takes a row's codes of two tiles: the rows lie K/2 bytes apart, and where that is a power of two they all
  // contend for two sets of L1 (8 cycles a load at K = 4096).
  const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, DgradCodes::Slice* slices) {
    const int tiles = int(k_count / DgradCodes::kTileC);
    const int64_t there = w.N - n < n_count ? w.N - n : n_count, row_bytes = w.K / 2;
    const uint8_t* row = w.packed + n * row_bytes + k / 2;
    for (int64_t i = 0; i < n_count; i += 2, row += 2 * row_bytes) {
      const uint8_t* next = i + 1 < there ? row + row_bytes : row;
      for (int g = 0; g < tiles; g += 2) {
        const __mmask8 half_or_all = g + 1 == tiles ? 0x0f : 0xff;  // of 8 quadwords
        const Isa::I even = _mm512_maskz_loadu_epi64(half_or_all, row + g * kTileBytes);
        const Isa::I odd = _mm512_maskz_loadu_epi64(half_or_all, next + g * kTileBytes);
        slices[g].codes[i / 2] = _mm512_permutex2var_epi16(even, words, odd);
        if (g + 1 < tiles) slices[g + 1].codes[i / 2] = _mm512_permutex2var_epi16(even, next_words, odd);
      }
    }
    for (int g = 0; g < tiles; ++g) {
      decode_scales(args, n, there, k + g * DgradCodes::kTileC, slices[g].scales);
      slices[g].row_bytes = row_bytes;
      slices[g].ahead = w.packed + (n + n_count < w.N ? (n + n_count) * row_bytes + k / 2 : (k + k_count) / 2);
    }
  };
  const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
    auto* dx = static_cast<BFloat16*>(args.out) + m * w.K + k;
    float natural[DgradCodes::kTileC];
    put_in_order(sums, natural);
    for (int64_t c = 0; c < k_count; c += Isa::L) Isa::store(dx + c, Isa::load(natural + c));
  };
  gemm<DgradCodes>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace
}  // namespace nf4::cpu
