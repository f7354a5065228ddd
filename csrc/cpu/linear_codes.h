// linear in bf16, M > 4, codes decoded in registers: y[m, n]
//              = sum_b scale[n, b] * (sum_{k in b} x[m, k] * code[n, k]) + bias[n]
//
// Read first   gemm.h, then codes_avx512.h.
// Work split   N tiles of 32 rows of W. The caller splits them over threads.
// Inner loop   Lane n of a register holds 8 codes of row n of W: 4 x (shift, vpermw) give the pairs (k, k + 4), each
//              multiplied with up to 12 rows of x, broadcast. The sums of a run of 64, 32 or 16 k meet the scales of 16
//              rows of W at once.
// The trick    A code is looked up unscaled, as bf16, straight into vdpbf16ps: 7 instructions give 128 weights, on
//              ports that the products leave idle. So each M tile looks them up anew, and nothing is stored.
// Rejected     Decoding to scaled bf16 in L1 (linear.h): 42 instructions and 4 stores for 128 weights, as long as the
//              products of 11 rows (4096x4096, M = 16: 4.1 against 3.0 ms; M = 512: the same 81; one Zen 4 EPYC core).
// Scales       A running sum is kept in units of the scale of its present block: one multiplication by the ratio of two
//              scales, and nothing leaves the registers. This is 8 % faster than scaling each block's sum into a second
//              set of sums, which is done where ratios are extreme or a scale is zero or NaN. Runs of 32 and 16 k cost
//              2 and 4 times as many ratios: 0 to 2 and 3 to 8 % more time (2048x2048, M = 16, one Xeon core).
// Prefetch     The lines of the next slice one by one between the products: in a burst they fill the miss buffers that
//              x needs (3.4 against 3.0 ms).
// Flops        2*M*N*K at one vdpbf16ps of 64 a cycle.
// Needs        a code_run. 2^10 times |x * code| summed over a block stays in fp32's range: the scale comes after it.
//
//   lane n of slice.codes[v][k / 8], 32 bits: 8 codes of one row of W, as they lie in memory
//
//     nibble        7  6  5  4 | 3  2  1  0         the even element of a byte is in its high nibble
//     holds k +     6  7  4  5 | 2  3  0  1
//                   high word  | low word
//
//   vpermw by nibble i of each word     i = 0   1     2     3
//   gives the pair (k + .., k + ..)        1,5   0,4   3,7   2,6      and in this order the panel holds 8 k of x
#pragma once

#include "codes_avx512.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

constexpr int kCodesOfWord = 8;  // in a lane's u32

// Panels are [M tile][slice of K][m][kSliceD], 8 k in the order above. RUN consecutive k share a scale.
template <int RUN>
struct LinearCodes {
  using Element = BFloat16;
  using Factor = LoraB;
  static constexpr int kStep = 64, kPanelStep = kSliceD, kTileM = 12, kTileC = kVectors * Isa::L, kGroup = 1;
  static constexpr int kBlocks = kSliceD / RUN;
  struct Slice {
    Isa::I codes[kVectors][kSliceD / kCodesOfWord];
    Isa::F scales[kVectors][kBlocks];
    Isa::F ratios[kVectors][kBlocks];  // of the block before to this one
    bool is_steady;                    // no two scales of a row are 2^10 apart
    const uint8_t* ahead;              // the slice after this one, in its first row of W
    int64_t row_bytes;                 // to its next row
  };

  template <int TILE_M>
  static void multiply(const GemmArgs& args, const Element* x, const Slice& slice, int64_t k_count, bool is_first,
                       float* tile) {
    const Isa::I table = load_code_table(args.bf16_code);
    alignas(64) float sums[TILE_M][kVectors][Isa::L];  // of the blocks before, unless is_steady
    Isa::F acc[TILE_M][kVectors];
    const auto each_sum = [&](auto body) {
#pragma GCC unroll 12
      for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) body(r, v);
    };
    const int64_t blocks = k_count / RUN;
    each_sum([&](int r, int v) { acc[r][v] = Isa::zero(); });
    for (int64_t b = 0; b < blocks; ++b) {
      if (b > 0 && slice.is_steady) {
        each_sum([&](int r, int v) { acc[r][v] = Isa::mul(acc[r][v], slice.ratios[v][b]); });
      } else if (b > 0) {
        each_sum([&](int r, int v) {
          const Isa::F block = Isa::mul(acc[r][v], slice.scales[v][b - 1]);
          Isa::store(sums[r][v], b == 1 ? block : Isa::add(block, Isa::load(sums[r][v])));
          acc[r][v] = Isa::zero();
        });
      }
      for (int64_t word = b * RUN / kCodesOfWord; word < (b + 1) * RUN / kCodesOfWord; ++word) {
        const Element* xw = x + word * kCodesOfWord;
        for (int line = 0; line < TILE_M; line += 4)  // of this tile's next slice
          __builtin_prefetch(x + TILE_M * kSliceD + (word * TILE_M / 4 + line / 4) * 32);
        __builtin_prefetch(slice.ahead + word * slice.row_bytes);
        __builtin_prefetch(slice.ahead + word * slice.row_bytes + 64);
        const auto add_products = [&](int pair, Isa::I first_values, Isa::I next_values) {
#pragma GCC unroll 12
          for (int r = 0; r < TILE_M; ++r) {
            const auto xr = (__m512bh)Isa::broadcast_pair(xw + r * kSliceD + 2 * pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], (__m512bh)first_values, xr);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], (__m512bh)next_values, xr);
          }
        };
        const Isa::I codes = slice.codes[0][word], next = slice.codes[1][word];
        add_products(0, code_values<0>(table, codes), code_values<0>(table, next));
        add_products(1, code_values<1>(table, codes), code_values<1>(table, next));
        add_products(2, code_values<2>(table, codes), code_values<2>(table, next));
        add_products(3, code_values<3>(table, codes), code_values<3>(table, next));
      }
    }
    each_sum([&](int r, int v) {
      float* out = tile + r * kTileC + v * Isa::L;
      Isa::F sum = Isa::mul(acc[r][v], slice.scales[v][blocks - 1]);
      if (!slice.is_steady && blocks > 1) sum = Isa::add(sum, Isa::load(sums[r][v]));
      Isa::store(out, is_first ? sum : Isa::add(sum, Isa::load(out)));
    });
  }
};

// GemmPackFn, of any RUN.
void linear_codes_pack(const void* x, Dtype, int64_t M, int64_t K, int64_t tile_begin, int64_t tile_end, void* panel) {
  const int64_t tiles = m_tiles(M, LinearCodes<64>::kTileM), padded = round_up(K, kSliceD);
  // By bytes: k 1, 5, 0, 4 | 3, 7, 2, 6 of each 8.
  const Isa::I order = _mm512_set4_epi32(0x0d0c0504, 0x0f0e0706, 0x09080100, 0x0b0a0302);
  const auto* in = static_cast<const BFloat16*>(x);
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t first = first_m(t, tiles, M), end = first_m(t + 1, tiles, M);
    auto* out = static_cast<BFloat16*>(panel) + first * padded;
    for (int64_t k = 0; k < K; k += 32)
      for (int64_t m = first; m < end; ++m) {
        const int64_t at = (k / kSliceD * (end - first) + m - first) * kSliceD + k % kSliceD;
        _mm512_storeu_si512(out + at, _mm512_shuffle_epi8(_mm512_loadu_si512(in + m * K + k), order));
      }
  }
}

template <int RUN>
void linear_code_runs(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  using Core = LinearCodes<RUN>;
  const Weight& w = args.weight;
  const Isa::F code_scale = Isa::set1(args.bf16_code.scale);
  const bool is_in_one_superblock = w.K % kSliceD == 0;  // a row's part of a slice
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, typename Core::Slice* slices) {
    typename Core::Slice& slice = *slices;
    slice.is_steady = true;
    slice.row_bytes = w.K / 2;
    slice.ahead = w.packed + (k + k_count < w.K ? n * w.K + k + k_count : (n + Core::kTileC) * w.K) / 2;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = n + v * Isa::L < n + n_count ? n + v * Isa::L : n + n_count - 1;
      const int64_t here = n + n_count - first < Isa::L ? n + n_count - first : Isa::L;
      const uint8_t* rows[Isa::L];
      for (int64_t r = 0; r < Isa::L; ++r) rows[r] = w.packed + (first + (r < here ? r : here - 1)) * (w.K / 2);
      for (int64_t i = 0; i < k_count; i += 32)
        Isa::load_transposed(rows, (k + i) / 2, slice.codes[v] + i / kCodesOfWord);
      Isa::F superblocks = Isa::zero();
      for (int64_t i = 0; i < k_count; i += 64) {
        const auto block = [&](int r) { return ((first + r) * w.K + k + i) >> w.block_shift; };
        if (i == 0 || !is_in_one_superblock) superblocks = gather_superblocks(w, int(here), block);
        gather_scales<RUN>(w, int(here), block, superblocks, slice.scales[v] + i / RUN);
      }
      for (int64_t b = 0; b < k_count / RUN; ++b) slice.scales[v][b] = Isa::mul(slice.scales[v][b], code_scale);
      const auto size = [&](int64_t b) { return _mm512_abs_ps(slice.scales[v][b]); };
      Isa::F least = size(0), most = size(0);
      for (int64_t b = 1; b < k_count / RUN; ++b) {
        slice.ratios[v][b] = _mm512_div_ps(slice.scales[v][b - 1], slice.scales[v][b]);
        least = _mm512_min_ps(least, size(b));
        most = _mm512_max_ps(most, size(b));
      }
      const Isa::F limit = Isa::mul(least, Isa::set1(0x1p10f));
      slice.is_steady &= _mm512_cmp_ps_mask(most, limit, _CMP_LT_OQ) == 0xffff;  // not if a scale is zero
    }
  };
  const auto store = [&](int64_t m, int64_t n, int64_t n_count, const float* sums) {
    store_y(args, m, n, n_count, sums);
  };
  gemm<Core>(args, /*D=*/w.K, /*C=*/w.N, tile_begin, tile_end, workspace, decode, store);
}

// GemmFn.
void linear_codes(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  with_code_run(args.weight, [&](auto run) { linear_code_runs<run.value>(args, tile_begin, tile_end, workspace); });
}

}  // namespace
}  // namespace nf4::cpu
