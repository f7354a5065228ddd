// linear of few rows straight from the codes, in bf16 or in whole numbers: y[m, n]
//              = sum_b scale[n, b] * (sum_{k in b} x[m, k] * code[n, k]) + bias[n]
//
// Read first   codes_avx512.h.
// Work split   Columns [n_begin, n_end) of y, two or four rows of W at a time, finished by sixteen, for up to four rows
//              of x, then for the next ones. The caller splits the columns over threads.
// Inner loop   128 codes of a row of W are one load; 4 x (shift, vpermw) give 32 of them each, which meet 32 elements
//              of x in the same order; then one FMA by the scales of the 2, 4 or 8 blocks. The rows of W share a load
//              of x.
// The trick    As in linear_codes.h: codes unscaled, straight into vdpbf16ps. What is said here of times is of that.
// Rejected     fp32 (linear_gemv.h): 4096x4096, M = 1: 0.87 against 0.47 ms, M = 4: 1.97 against 0.92 (one core of a
//              Zen 4 EPYC). Scales 16 at a time through memory: stores of 4 bytes stall the load of 64, 0.56 ms. Stored
//              a chunk ahead: 7 % less in a cache, but 0.7 against 0.5 ms out of it, where absmax is waited for.
// Prefetch     The next two rows of W line by line in the order of memory, whichever row is being read: 0.30 ms on two
//              cores out of cache, which is the read limit; each row's own lines ahead, 0.47; one row at a time, 0.36
//              (M = 1). Into the L2 where x leaves no room in the L1: 4096x14336, M = 1: 1.63 to 1.24 ms, M = 2: 1.85 to
//              1.62, M = 3: 2.07 to 1.73, M = 4: 2.16 and 2.23; at K = 4096, M = 2 and 3, 11 % slower (two cores).
// Registers    Loops over rows are unrolled by pragma: as loops they kept the sums in memory, M = 1: 18 instead of 13.6
//              cycles for 128 weights in a cache, M = 2: 29 and 17, M = 4: 42 and 26.
// Short rows   At M = 1 four rows of W at a time, whose lanes are added together. K = 576: 24.5 to 18.8 ns a row in a
//              cache, 26.6 to 20.3 out of it (one core); K = 2048: 10 % less out of it; K = 3584: 4 to 26 % more. To
//              finish columns together is worth 15 % at K = 576, M = 2 to 4, and 2 % at K = 4096.
// Scales       Two scalars for each 128 codes are a third of the instructions at M = 1, so that where gathers are fast
//              (Emerald Rapids) 16 are gathered at a time: M = 1: 1.19 to 1.29 times as fast, M = 2: 1.13 to 1.23 (in a
//              cache, without the call); M = 3: 0.97 to 1.08, M = 4: 0.95 to 1.0, runs of 16: 0.9 to 1.0, so not there.
// Bytes        Reads 0.52 B a weight (double-quantized): the floor is that over the memory or L3 bandwidth.
// Needs        a code_run. |x * code| summed over a block stays in fp32's range: the scale comes after that sum.
//
//   lane l of the products of 128 k             8 k from 8l on
//   its scale, of blocks of 64, 32, 16          block l / 8, l / 4, l / 2
//
//   panel: [K / 128][M][nibble][32], padded with zeros, and what Terms add to it; 128 k of a row of x
//
//     | nibble 0: k 1 5 9 .. 125 | nibble 1: k 0 4 8 .. 124 | nibble 2: k 3 7 .. 127 | nibble 3: k 2 6 .. 126 |
#pragma once

#include "codes_avx512.h"
#include "linear.h"

namespace nf4::cpu {
namespace {

constexpr int kGemvGroupK = 128;     // k of one load of codes
constexpr int64_t kGemvRunK = 1024;  // k whose sums start anew
constexpr int kCodesTileN = 2;       // rows of W per load of x
constexpr int kCodesShortTileN = 4;  // the same at M = 1, where W's rows have up to kGemvShortK elements
constexpr int64_t kGemvShortK = 2048;
constexpr int kGemvStoreN = 16;       // columns of y that are finished together
constexpr int64_t kGemvNearK = 8192;  // up to which the next rows of W have room in an L1 of 32 KB beside x
constexpr int kToL1 = 3, kToL2 = 2;   // localities of __builtin_prefetch

template <int N>
struct Count {
  static constexpr int value = N;
};

// Terms: what the levels are multiplied as; bf16 in linear_avx512_bf16.cpp, whole numbers in linear_gemv_codes_int.h.
//
//   kMaxM          of rows of x, by four at a time
//   kGathersScales whether the CPU's gathers are fast
//   Sum            a register of sums; add_products(sum, the levels of 32 codes, where the same 32 elements of x are)
//   kGroupBytes    of the panel, for 128 k of a row of x: four registers of elements, then what `value` needs
//   pack_group     of `count` = 64 or 128 elements from x[at] on: four registers in order, and what `value` needs
//   value          the sums in fp32, but for the scales of W and the codebook's

template <class Terms>
int64_t gemv_codes_row_bytes(int64_t K) {
  return (K + kGemvGroupK - 1) / kGemvGroupK * Terms::kGroupBytes;
}

template <class Terms>
void gemv_codes_pack(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel) {
  auto* out = static_cast<char*>(panel);
  const Isa::I every_fourth = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0, 60, 56, 52,
                                               48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
  for (int64_t k = 0; k < K; k += kGemvGroupK)
    for (int64_t m = 0; m < M; ++m, out += Terms::kGroupBytes) {
      Isa::I quarters[4];
      Terms::pack_group(x, dtype, m * K + k, K - k < kGemvGroupK ? K - k : kGemvGroupK, quarters, out);
      for (int i = 0; i < 4; ++i) {  // the word's code i is nibble i ^ 1
        const Isa::I which = _mm512_add_epi16(every_fourth, _mm512_set1_epi16(short(i)));
        const Isa::I low = _mm512_permutex2var_epi16(quarters[0], which, quarters[1]);
        const Isa::I high = _mm512_permutex2var_epi16(quarters[2], which, quarters[3]);
        _mm512_storeu_si512(out + (i ^ 1) * 64, _mm512_mask_mov_epi64(low, 0xf0, high));
      }
    }
}

// The run of 16 or 32 that each of 16 groups of 8 codes is in.
template <int RUN>
static inline Isa::I run_of_group() {
  const Isa::I groups = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_srli_epi32(groups, RUN == 32 ? 2 : 1);
}

// The scales of 16 groups of 8 codes from element `at` on, lane by lane; of the first 8 groups alone, unless is_whole.
template <int RUN>
static inline Isa::F scales_of_groups(const Weight& w, int64_t at, bool is_whole) {
  constexpr int kBlocks = kGemvGroupK / RUN;
  const int64_t block = at >> w.block_shift;
  if constexpr (RUN == 64) {
    const int64_t next = (at + (is_whole ? RUN : 0)) >> w.block_shift;
    if (w.scales != Scales::kDouble) {
      const float scales[2] = {block_scale(w, block), block_scale(w, next)};
      return broadcast_halves(scales, scales + 1);
    }
    const auto* absmax = w.absmax_as<uint8_t>();
    const Isa::F values = broadcast_halves(w.scale_code + absmax[block], w.scale_code + absmax[next]);
    const Isa::F groups =
        broadcast_halves(w.scale_absmax + (block >> kSuperblockShift), w.scale_absmax + (next >> kSuperblockShift));
    return Isa::add(Isa::mul(values, groups), Isa::set1(*w.scale_offset));
  } else {
    return _mm512_permutexvar_ps(run_of_group<RUN>(), load_scales<kBlocks>(w, block, is_whole ? kBlocks : kBlocks / 2));
  }
}

// The same in two steps: the scales of `count` runs of W from element `at` on, 16 gathered at a time, ...
template <int RUN>
static inline void gather_scales_of_runs(const Weight& w, int64_t at, int64_t count, float* scales) {
  const Isa::I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < count; i += Isa::L, at += Isa::L * RUN) {
    const int64_t here = count - i < Isa::L ? count - i : Isa::L;
    const int64_t block = at >> w.block_shift, last = (at + here * RUN - 1) >> w.block_shift;
    Isa::F own = load_scales<Isa::L>(w, block, int(last - block) + 1);
    if (RUN == 64 && w.block_shift > 6) {  // blocks of several runs
      const Isa::I runs = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(at / RUN - (block << (w.block_shift - 6)))));
      own = _mm512_permutexvar_ps(_mm512_srl_epi32(runs, _mm_cvtsi32_si128(w.block_shift - 6)), own);
    }
    Isa::store(scales + i, own);
  }
}
// ... and those of 16 groups of 8 codes from them, of runs of 32 or 64.
template <int RUN>
static inline Isa::F spread_scales(const float* scales) {
  if constexpr (RUN == 64) return broadcast_halves(scales, scales + 1);
  return _mm512_permutexvar_ps(run_of_group<RUN>(), _mm512_castps128_ps512(_mm_loadu_ps(scales)));
}

// The sums of the lanes of a, b, c and d, all in one order of additions.
static inline __m128 reduce_four(Isa::F a, Isa::F b, Isa::F c, Isa::F d) {
  const auto halves = [](Isa::F v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
  const auto pairs = [](__m256 v, __m256 w) {
    return _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(v, w), _mm256_unpackhi_ps(v, w)));
  };
  const __m256d ab = pairs(halves(a), halves(b)), cd = pairs(halves(c), halves(d));
  const __m256 all =
      _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// sums[i][r] = x[m + i, :] . W[n + r, :], i < M, r < TILE_N; the next rows are prefetched to the cache of that LOCALITY
template <class Terms, int RUN, int M, int TILE_N, int LOCALITY = kToL1>
void dot_codes(const GemmArgs& args, Isa::I table, int64_t m_begin, int64_t n, float (*sums)[kGemvStoreN]) {
  constexpr bool kGathers = Terms::kGathersScales && M <= 2 && RUN >= 32;
  const Weight& w = args.weight;
  const char* group = static_cast<const char*>(args.panel) + m_begin * Terms::kGroupBytes;
  const int64_t next_group = (Terms::kMaxM > kGemvMaxM ? args.M : M) * Terms::kGroupBytes;
  const uint8_t* packed = w.packed + n * (w.K / 2);
  Isa::F total[TILE_N][M];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_N; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[r][m] = Isa::zero();
  for (int64_t chunk = 0; chunk < w.K; chunk += kGemvRunK) {
    const int64_t left = w.K - chunk, count = left < kGemvRunK ? left : kGemvRunK;
    Isa::F part[TILE_N][M];
#pragma GCC unroll 4
    for (int r = 0; r < TILE_N; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) part[r][m] = Isa::zero();
    alignas(64) float gathered[kGathers ? TILE_N * kGemvRunK / RUN + Isa::L : 1];
    const int64_t runs = count / RUN;
    if constexpr (kGathers) {
      if (count == w.K)  // the rows lie together
        gather_scales_of_runs<RUN>(w, n * w.K, TILE_N * runs, gathered);
      else
        for (int r = 0; r < TILE_N; ++r)
          gather_scales_of_runs<RUN>(w, (n + r) * w.K + chunk, runs, gathered + r * runs);
    }
    const auto add_group = [&](int64_t i, bool is_whole) __attribute__((always_inline)) {
      const __mmask8 there = is_whole ? 0xff : 0x0f;  // of 8 quadwords
      Isa::I codes[TILE_N];
      typename Terms::Sum acc[TILE_N][M];
#pragma GCC unroll 4
      for (int r = 0; r < TILE_N; ++r) {
        __builtin_prefetch(packed + TILE_N * (w.K + chunk + i) / 2 + 64 * r, 0, LOCALITY);
        codes[r] = _mm512_maskz_loadu_epi64(there, packed + (r * w.K + chunk + i) / 2);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = Terms::zero();
      }
      const auto add_products = [&](int nibble, auto values) {
        Isa::I here[TILE_N];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_N; ++r) here[r] = values(codes[r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const char* xm = group + m * Terms::kGroupBytes + nibble * 64;
#pragma GCC unroll 4
          for (int r = 0; r < TILE_N; ++r) acc[r][m] = Terms::add_products(acc[r][m], here[r], xm);
        }
      };
      add_products(0, [&](Isa::I c) { return code_values<0>(table, c); });
      add_products(1, [&](Isa::I c) { return code_values<1>(table, c); });
      add_products(2, [&](Isa::I c) { return code_values<2>(table, c); });
      add_products(3, [&](Isa::I c) { return code_values<3>(table, c); });
#pragma GCC unroll 4
      for (int r = 0; r < TILE_N; ++r) {
        const Isa::F scales = kGathers ? spread_scales<RUN>(gathered + r * runs + i / RUN)
                                       : scales_of_groups<RUN>(w, (n + r) * w.K + chunk + i, is_whole);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {  // beyond a row's end the code is 0, whose level may be NaN
          const Isa::F sum = Terms::value(acc[r][m], group + m * Terms::kGroupBytes);
          part[r][m] =
              is_whole ? Isa::fma(sum, scales, part[r][m]) : _mm512_mask3_fmadd_ps(sum, scales, part[r][m], 0x00ff);
        }
      }
      group += next_group;
    };
    int64_t i = 0;
    for (; i + kGemvGroupK <= count; i += kGemvGroupK) add_group(i, true);
    if (i < count) add_group(i, false);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_N; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[r][m] = Isa::add(total[r][m], part[r][m]);
  }
  constexpr int kSums = M * TILE_N;
  const auto lanes = [&](int i) { return i < kSums ? total[i % TILE_N][i / TILE_N] : Isa::zero(); };
#pragma GCC unroll 2
  for (int i = 0; i < kSums; i += 4) {
    float four[4];
    const __m128 of_rows = reduce_four(lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3));
    _mm_storeu_ps(four, _mm_mul_ps(of_rows, _mm_set1_ps(Terms::code_scale(args))));
    for (int j = 0; j < 4 && i + j < kSums; ++j) sums[(i + j) / TILE_N][(i + j) % TILE_N] = four[j];
  }
}

// Apart, so that the compiler goes on inlining the near one.
template <class Terms, int RUN, int M, int TILE_N>
[[gnu::noinline]] void dot_codes_of_long_row(const GemmArgs& args, Isa::I table, int64_t m, int64_t n,
                                             float (*sums)[kGemvStoreN]) {
  dot_codes<Terms, RUN, M, TILE_N, kToL2>(args, table, m, n, sums);
}

// y[m .. m + M, n .. n + count) by tiles of TILE_N rows of W, and single rows at the end.
template <class Terms, int RUN, int M, int TILE_N>
void gemv_code_columns(const GemmArgs& args, Isa::I table, int64_t m, int64_t n, int64_t count) {
  float sums[M][kGemvStoreN];
  const auto dot = [&](auto tile_n, int64_t j) {
    float part[M][kGemvStoreN];
    if (args.weight.K > kGemvNearK)
      dot_codes_of_long_row<Terms, RUN, M, tile_n.value>(args, table, m, n + j, part);
    else
      dot_codes<Terms, RUN, M, tile_n.value>(args, table, m, n + j, part);
    for (int i = 0; i < M; ++i) std::memcpy(sums[i] + j, part[i], tile_n.value * sizeof(float));
  };
  int64_t j = 0;
  for (; j + TILE_N <= count; j += TILE_N) dot(Count<TILE_N>{}, j);
  for (; j < count; ++j) dot(Count<1>{}, j);
  for (int i = 0; i < M; ++i) {
    with_type(args.dtype, [&](auto t) {
      for (j = 0; args.rank > 0 && j < count; ++j) sums[i][j] += lora_term_of<decltype(t)>(args, m + i, n + j);
    });
    store_y(args, m + i, n, count, sums[i]);
  }
}

template <class Terms, int RUN>
void gemv_code_runs(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const Isa::I table = Terms::load_table(args);
  const int64_t tiles = m_tiles(args.M, kGemvMaxM);
  for (int64_t n = n_begin; n < n_end; n += kGemvStoreN)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = first_m(tile, tiles, args.M), count = n_end - n < kGemvStoreN ? n_end - n : kGemvStoreN;
      switch (first_m(tile + 1, tiles, args.M) - m) {
        case 1:
          if (args.weight.K > kGemvShortK)
            gemv_code_columns<Terms, RUN, 1, kCodesTileN>(args, table, m, n, count);
          else
            gemv_code_columns<Terms, RUN, 1, kCodesShortTileN>(args, table, m, n, count);
          break;
        case 2: gemv_code_columns<Terms, RUN, 2, kCodesTileN>(args, table, m, n, count); break;
        case 3: gemv_code_columns<Terms, RUN, 3, kCodesTileN>(args, table, m, n, count); break;
        default: gemv_code_columns<Terms, RUN, 4, kCodesTileN>(args, table, m, n, count);
      }
    }
}

// GemvFn.
template <class Terms>
void gemv_codes(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  with_code_run(args.weight, [&](auto run) { gemv_code_runs<Terms, run.value>(args, n_begin, n_end); });
}

template <class Terms>
constexpr GemvKernel describe_gemv_codes() {
  return {Terms::kMaxM, gemv_codes_row_bytes<Terms>, gemv_codes_pack<Terms>, gemv_codes<Terms>};
}

}  // namespace
}  // namespace nf4::cpu
