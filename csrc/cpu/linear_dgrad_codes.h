// linear_dgrad in bf16, codes decoded in registers: dX[m, k] = sum_n (dY[m, n] * scale[n, b of k]) * code[n, k]
//
// Read first   gemm.h, then codes_avx512.h.
// Work split   K tiles of 64 k, which have 1, 2 or 4 scales in each row of W: so many parts. The caller splits the
//              tiles over threads.
// Inner loop   A register holds 64 k of rows n and n+1 of W: 4 x (shift, vpermw) give the pairs (n, n+1) of 16 k each,
//              each x up to 6 rows of dY, broadcast.
// The trick    A scale belongs to one n, which is summed over, so it goes into dY: once per part, rounded to bf16 as a
//              weight would be. Codes are looked up unscaled, straight into vdpbf16ps, as linear_codes.h does.
// Rejected     Decoding to scaled bf16 in L1 (linear_dgrad.h): as long as the products of 16 rows of dY (4096x4096,
//              M = 16: 4.5 against 3.2 ms, M = 128: both 22, M = 256: 41 against 44; one core of a Zen 4 EPYC).
// Flops        2*M*N*K at one vdpbf16ps of 64 a cycle, and 4 instructions in 64 for the scaling of dY.
//              That scaling grows with the parts: at M = 16, 0 to 4 % for two and 8 to 12 % for four (2048x2048, one
//              Xeon core).
// Needs        a code_run; |dY * scale| in fp32's range.
//
//   lane j of slice.codes[n / 2], 32 bits         codes k = 4j .. 4j+3 of two rows of W
//
//     nibble        7  6  5  4 | 3  2  1  0
//     holds 4j +    2  3  0  1 | 2  3  0  1
//                   row n + 1  | row n
//
//   nibble v of each word: vector v of the tile, acc[m][v]   v = 0   1    2     3
//   lane j holds dX at k = 4j + (v ^ 1)                        4j+1  4j  4j+3  4j+2
//
//   With P parts the lanes of a part lie P apart, so that a load which repeats P pairs of dY fills a register; the sums
//   are put in order once a slice.
//
//     scaled dY, P = 2     | n, n+1 by scale 0 | n, n+1 by scale 1 | n+2, n+3 by scale 0 | ..
//     a register of it     | pair of scale 0 | pair of scale 1 | pair of scale 0 | .. 8 times
//     codes, lane          | word 0: k 0..3  | word 8: k 32..35 | word 1: k 4..7 | ..
#pragma once

#include "codes_avx512.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

// Which of 16 words is in which lane: lane l belongs to part l % PARTS.
template <int PARTS>
struct PartOrder {
  static constexpr int kWords = Isa::L / PARTS;  // of 4 k, in a part
  static constexpr int word_of_lane(int lane) { return lane % PARTS * kWords + lane / PARTS; }
  static constexpr int lane_of_word(int word) { return word % kWords * PARTS + word / kWords; }
  // Words 0..15 of two rows of 32 in the order of the lanes, the second row's in the high half of a lane.
  static Isa::I two_rows() {
    alignas(64) uint16_t index[2 * Isa::L];
    for (int lane = 0; lane < Isa::L; ++lane) {
      index[2 * lane] = uint16_t(word_of_lane(lane));
      index[2 * lane + 1] = uint16_t(2 * Isa::L + word_of_lane(lane));
    }
    return _mm512_load_si512(index);
  }
  // Lane j: word j.
  static Isa::F natural(Isa::F lanes) {
    if constexpr (PARTS == 1) return lanes;
    alignas(64) int32_t index[Isa::L];
    for (int word = 0; word < Isa::L; ++word) index[word] = lane_of_word(word);
    return _mm512_permutexvar_ps(_mm512_load_si512(index), lanes);
  }
};

// The pair of each part at p, in that order of lanes.
template <int PARTS>
static inline Isa::I broadcast_parts(const BFloat16* p) {
  if constexpr (PARTS == 1) return Isa::broadcast_pair(p);
  if constexpr (PARTS == 4) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  int64_t pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return _mm512_set1_epi64(pairs);
}

// Lane 0 of each part, then lane 1 of each, and so on.
static inline void store_interleaved(const Isa::I (&parts)[1], BFloat16* out) { _mm512_storeu_si512(out, parts[0]); }
static inline void store_interleaved(const Isa::I (&parts)[2], BFloat16* out) {
  const Isa::I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi32(parts[0], low, parts[1]));
  const Isa::I high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_si512(out + 2 * Isa::L, _mm512_permutex2var_epi32(parts[0], high, parts[1]));
}
static inline void store_interleaved(const Isa::I (&parts)[4], BFloat16* out) {
  const Isa::I halves[2][2] = {{parts[0], parts[1]}, {parts[2], parts[3]}};
  alignas(64) BFloat16 twos[2][4 * Isa::L];
  store_interleaved(halves[0], twos[0]);
  store_interleaved(halves[1], twos[1]);
  const Isa::I low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Isa::I a = _mm512_load_si512(twos[0] + 2 * Isa::L * i), b = _mm512_load_si512(twos[1] + 2 * Isa::L * i);
    _mm512_storeu_si512(out + 4 * Isa::L * i, _mm512_permutex2var_epi64(a, low, b));
    _mm512_storeu_si512(out + 4 * Isa::L * i + 2 * Isa::L, _mm512_permutex2var_epi64(a, high, b));
  }
}

// Panels are [M tile][slice of N][m][kSliceD], padded with zeros. RUN consecutive k share a scale.
template <int RUN>
struct DgradCodes {
  using Element = BFloat16;
  using Factor = LoraA<NibbleByNibble>;
  static constexpr int kNibbles = 4;  // of a word: as many weight vectors
  static constexpr int kStep = 2, kPanelStep = kSliceD, kTileM = 6, kTileC = kNibbles * Isa::L, kGroup = 2;
  static constexpr int kParts = kTileC / RUN;  // of the tile, each with its scale
  struct Slice {
    Isa::I codes[kSliceD / 2];
    alignas(64) float scales[kParts][kSliceD];
    const uint8_t* ahead;  // the slice after this one, in its first row of W
    int64_t row_bytes;     // to its next row
  };

  template <int TILE_M>
  static void multiply(const GemmArgs& args, const Element* dy, const Slice& slice, int64_t n_count, bool is_first,
                       float* tile) {
    alignas(64) Element scaled[TILE_M][kSliceD * kParts];  // [n / 2][part][2]
    for (int r = 0; r < TILE_M; ++r)
      for (int64_t n = 0; n < n_count; n += 2 * Isa::L) {
        const Isa::F low = Isa::load(dy + r * kSliceD + n), high = Isa::load(dy + r * kSliceD + n + Isa::L);
        Isa::I pairs[kParts];
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          const float* scales = slice.scales[p] + n;
          const Isa::F scaled_low = Isa::mul(low, Isa::load(scales));
          const Isa::F scaled_high = Isa::mul(high, Isa::load(scales + Isa::L));
          pairs[p] = (Isa::I)_mm512_cvtne2ps_pbh(scaled_high, scaled_low);
        }
        store_interleaved(pairs, scaled[r] + n * kParts);
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
      const Isa::I values[kNibbles] = {code_values<0>(table, codes), code_values<1>(table, codes),
                                       code_values<2>(table, codes), code_values<3>(table, codes)};
#pragma GCC unroll 6
      for (int r = 0; r < TILE_M; ++r) {
        const auto dy_pair = (__m512bh)broadcast_parts<kParts>(scaled[r] + 2 * kParts * pair);
#pragma GCC unroll 4
        for (int v = 0; v < kNibbles; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)values[v], dy_pair);
      }
    }
    const PartOrder<kParts> order;
    for (int r = 0; r < TILE_M; ++r)
      for (int v = 0; v < kNibbles; ++v) {
        float* out = tile + r * kTileC + v * Isa::L;
        const Isa::F sums = order.natural(acc[r][v]);
        Isa::store(out, is_first ? sums : Isa::add(sums, Isa::load(out)));
      }
  }
};

// GemmPackFn, of any RUN.
void dgrad_codes_pack(const void* dy, Dtype, int64_t M, int64_t N, int64_t tile_begin, int64_t tile_end, void* panel) {
  const int64_t tiles = m_tiles(M, DgradCodes<64>::kTileM), padded = round_up(N, kSliceD);
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

// The scales from k on of rows [n, n + kSliceD) of W; past n_count, where dY is zero, of the last row or zero.
template <int RUN>
static inline void decode_scales(const GemmArgs& args, int64_t n, int64_t n_count, int64_t k,
                                 float (&scales)[64 / RUN][kSliceD]) {
  const Weight& w = args.weight;
  const Isa::F code_scale = Isa::set1(args.bf16_code.scale);
  for (int64_t i = 0; i < kSliceD; i += Isa::L) {
    Isa::F parts[64 / RUN] = {};
    if (i < n_count) {
      const int here = n_count - i < Isa::L ? int(n_count - i) : Isa::L;
      const auto block = [&](int r) { return ((n + i + r) * w.K + k) >> w.block_shift; };
      gather_scales<RUN>(w, here, block, gather_superblocks(w, here, block), parts);
    }
    for (int p = 0; p < 64 / RUN; ++p) Isa::store(scales[p] + i, Isa::mul(parts[p], code_scale));
  }
}

template <int RUN>
void linear_dgrad_code_runs(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  using Core = DgradCodes<RUN>;
  const Weight& w = args.weight;
  const Isa::I words = PartOrder<Core::kParts>::two_rows();
  const Isa::I next_words = _mm512_add_epi16(words, _mm512_set1_epi16(16));
  constexpr int kTileBytes = Core::kTileC / 2;
  // One load takes a row's codes of two tiles: the rows lie K/2 bytes apart, and where that is a power of two they all
  // contend for two sets of L1 (8 cycles a load at K = 4096).
  const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, typename Core::Slice* slices) {
    const int tiles = int(k_count / Core::kTileC);
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
      decode_scales<RUN>(args, n, there, k + g * Core::kTileC, slices[g].scales);
      slices[g].row_bytes = row_bytes;
      slices[g].ahead = w.packed + (n + n_count < w.N ? (n + n_count) * row_bytes + k / 2 : (k + k_count) / 2);
    }
  };
  const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
    store_in_order(sums, args, m, k, k_count);
  };
  gemm<Core>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
}

// GemmFn.
void linear_dgrad_codes(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  with_code_run(args.weight,
                [&](auto run) { linear_dgrad_code_runs<run.value>(args, tile_begin, tile_end, workspace); });
}

}  // namespace
}  // namespace nf4::cpu
