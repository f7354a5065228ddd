// linear in bf16 on NEON, M > 4, codes unscaled: y[m, n]
//              = sum_b scale[n, b] * (sum_{k in b} x[m, k] * code[n, k]) + bias[n]
//
// Read first   gemm_neon_bf16.h, then codes_neon_bf16.h.
// Work split   N tiles of 16 rows of W. The caller splits them over threads.
// Inner loop   Codes become bf16 in L1 once for all M, as they are: 36 instructions for 64 weights. bfmmla multiplies
//              them; the sums of a run of 64, 32 or 16 k meet its scales, which serve 6 rows of x at once.
// Rejected     Looking codes up again for each M tile, as linear_codes.h does: a lookup takes as long as the products of
//              6 rows, where vpermw takes a fifth of them. Scaling before rounding to bf16: 0.75 instructions a weight
//              more, once, against 3 in 16 more beside the products (predicted: equal at M = 150).
// Flops        2*M*N*K at 32 a bfmmla.
// Needs        a code_run. |x * code| summed over a run stays in fp32's range: the scale comes after that sum.
//
//   16 bytes of rows n and n+1, zipped by 2 bytes     | n: k 0-3 | n+1: k 0-3 | n: k 4-7 | n+1: k 4-7 | ..
//   even and odd codes of 16 such bytes, zipped       | n: codes k 0 1 2 3 | n+1: 0 1 2 3 | n: 4 5 6 7 | n+1: 4 5 6 7 |
//   looked up                                         two registers of B, of k 0-3 and of k 4-7
#pragma once

#include "gemm_neon_bf16.h"
#include "linear.h"

namespace nf4::cpu {
namespace {

// RUN consecutive k share a scale.
template <int RUN>
struct LinearCodes : Bf16Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1, kBlocks = kSliceD / RUN;
  struct Slice {
    Element values[kSliceD * kDecodedTileC];
    float scales[kBlocks][kDecodedTileC / 2][4];  // in the order of a register of sums
  };

  template <int TILE_M>
  static void multiply(const GemmArgs&, const Element* x, const Slice& slice, int64_t k_count, bool is_first,
                       float* tile) {
    const Element* b = slice.values;
    Sums<TILE_M> run, sums;
    sums.clear();
    for (int64_t block = 0; block < k_count / RUN; ++block) {
      run.clear();
      run.add_products(x, b, RUN);
      run.each([&](int p, int q) {
        const float32x4_t scale = vld1q_f32(slice.scales[block][q]);
        sums.of[p][q] = vfmaq_f32(sums.of[p][q], run.of[p][q], scale);
      });
    }
    sums.add_to(tile, is_first);
  }
};

// k_count k, a multiple of 64, of rows n and n+1 of W into columns c and c+1 of values.
static inline void decode_two_rows(const CodeTable& table, const uint8_t* row, const uint8_t* next, int64_t k_count,
                                   BFloat16* values) {
  constexpr int kGroupOf4 = 4 * kDecodedTileC;
  for (int64_t byte = 0; byte < k_count / 2; byte += 16) {
    const uint16x8_t a = Isa::load_bits(row + byte), b = Isa::load_bits(next + byte);
    const uint8x16_t zipped[2] = {vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))};
    for (int half = 0; half < 2; ++half, values += 4 * kGroupOf4) {
      const uint8x16_t even = even_codes(zipped[half]), odd = odd_codes(zipped[half]);
      bfloat16x8_t groups[4];
      table.values(vzip1q_u8(even, odd), groups[0], groups[1]);
      table.values(vzip2q_u8(even, odd), groups[2], groups[3]);
      for (int g = 0; g < 4; ++g) store_bf16(values + g * kGroupOf4, groups[g]);
    }
  }
}

template <int RUN>
void linear_code_runs(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  using Core = LinearCodes<RUN>;
  const Weight& w = args.weight;
  const CodeTable table(args.bf16_code);
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, typename Core::Slice* slice) {
    const auto row_of = [&](int64_t c) { return n + (c < n_count ? c : n_count - 1); };
    for (int64_t c = 0; c < Core::kTileC; c += 2) {
      const uint8_t* rows[2];
      for (int r = 0; r < 2; ++r) {
        rows[r] = w.packed + (row_of(c + r) * w.K + k) / 2;
        // The next slice: the rows lie K/2 bytes apart, further than hardware looks ahead.
        for (int64_t line = 0; line < k_count / 2; line += 64) __builtin_prefetch(rows[r] + k_count / 2 + line);
        float scales[Core::kBlocks];
        const int64_t first = row_of(c + r) * w.K + k;
        const auto block = [&](int64_t b) { return (first + b * RUN) >> w.block_shift; };
        gather_scales(w, k_count / RUN, args.bf16_code.scale, block, scales);
        for (int64_t b = 0; b < k_count / RUN; ++b)
          slice->scales[b][c / 2][r] = slice->scales[b][c / 2][r + 2] = scales[b];
      }
      decode_two_rows(table, rows[0], rows[1], k_count, slice->values + c * Core::kStep);
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

// Any K: W is scaled and rounded to bf16, row by row.
struct LinearBf16 : Bf16Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1;
};
void linear_spans(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, LinearBf16::Slice* slice) {
    decode_tile_spans<LinearBf16>(w, n, n_count, k, k_count, *slice);
  };
  const auto store = [&](int64_t m, int64_t n, int64_t n_count, const float* sums) {
    store_y(args, m, n, n_count, sums);
  };
  gemm<LinearBf16>(args, /*D=*/w.K, /*C=*/w.N, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace
}  // namespace nf4::cpu
