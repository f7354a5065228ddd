// linear in bf16 on NEON, M <= 4, straight from the codes: y[m, n]
//              = sum_b scale[n, b] * (sum_{k in b} x[m, k] * code[n, k]) + bias[n]
//
// Read first   codes_neon_bf16.h.
// Work split   Columns [n_begin, n_end) of y, two rows of W at a time. The caller splits them over threads.
// Inner loop   32 codes of a row of W are one load, a shift and a mask; 8 instructions make bf16 of them, which 4 bfdot
//              multiply with 32 elements of x in the same order. The sums of a run of 64, 32 or 16 k meet its scale.
// Rejected     fp32 (linear_gemv.h): 12 instructions of lookup for 16 weights against 4, and 4 products against 2.
// Prefetch     The next two rows of W, a line for each 128 k, whichever row is being read, as in linear_gemv_codes.h.
// Bytes        Reads 0.52 B a weight (double-quantized): the floor is that over the memory or L3 bandwidth.
// Needs        a code_run. |x * code| summed over a run stays in fp32's range: the scale comes after that sum.
//
//   panel, bf16: [K / 32][M][32]; a run of 16 k has the sums of one register of either half
//
//     | k 0 2 .. 14 | k 16 18 .. 30 | k 1 3 .. 15 | k 17 19 .. 31 |
#pragma once

#include "codes_neon_bf16.h"
#include "decode_span.h"
#include "lora_term.h"

namespace nf4::cpu {
namespace {

constexpr int kGemvGroupK = 32;      // k of one load of codes
constexpr int64_t kGemvRunK = 1024;  // k whose sums start anew
constexpr int kGemvTileRows = 2;     // rows of W per load of x

int64_t gemv_codes_row_bytes(int64_t K) { return (K + kGemvGroupK - 1) / kGemvGroupK * kGemvGroupK * 2; }

void gemv_codes_pack(const void* x, Dtype, int64_t M, int64_t K, void* panel) { pack_even_odd(x, M, K, panel); }

// sums[r][m] = x[m, :] . W[n + r, :], r < TILE_N
template <int RUN, int M, int TILE_N>
void dot_codes(const GemmArgs& args, const CodeTable& table, int64_t n, float sums[][kGemvMaxM]) {
  constexpr int kStepK = RUN == 64 ? 64 : kGemvGroupK, kSumsOfStep = RUN == 16 ? 2 : 1;
  const Weight& w = args.weight;
  const auto* x = static_cast<const BFloat16*>(args.panel);
  const uint8_t* packed = w.packed + n * (w.K / 2);
  float32x4_t total[TILE_N][M];
  for (int r = 0; r < TILE_N; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = vdupq_n_f32(0);
  for (int64_t chunk = 0; chunk < w.K; chunk += kGemvRunK) {
    const int64_t left = w.K - chunk, count = left < kGemvRunK ? left : kGemvRunK;
    float scales[TILE_N][kGemvRunK / RUN];
    float32x4_t part[TILE_N][M];
    for (int r = 0; r < TILE_N; ++r) {
      const int64_t first = (n + r) * w.K + chunk;
      gather_scales(w, count / RUN, [&](int64_t b) { return (first + b * RUN) >> w.block_shift; }, scales[r]);
      for (int m = 0; m < M; ++m) part[r][m] = vdupq_n_f32(0);
    }
    for (int64_t i = 0; i < count; i += kStepK) {
      float32x4_t acc[kSumsOfStep][TILE_N][M];
#pragma GCC unroll 2
      for (int s = 0; s < kSumsOfStep; ++s)
        for (int r = 0; r < TILE_N; ++r)
          for (int m = 0; m < M; ++m) acc[s][r][m] = vdupq_n_f32(0);
      __builtin_prefetch(packed + (TILE_N * (w.K + chunk + i)) / 2);
#pragma GCC unroll 2
      for (int64_t at = i; at < i + kStepK; at += kGemvGroupK) {
        uint16x8_t values[TILE_N][4];
        for (int r = 0; r < TILE_N; ++r) {
          const uint8x16_t bytes = vld1q_u8(packed + (r * w.K + chunk + at) / 2);
          table.values(even_codes(bytes), values[r][0], values[r][1]);
          table.values(odd_codes(bytes), values[r][2], values[r][3]);
        }
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const bfloat16x8_t xm = load_bf16(x + (chunk + at) * M + m * kGemvGroupK + 8 * v);
            for (int r = 0; r < TILE_N; ++r) {
              float32x4_t& sum = acc[v % kSumsOfStep][r][m];
              sum = vbfdotq_f32(sum, vreinterpretq_bf16_u16(values[r][v]), xm);
            }
          }
      }
#pragma GCC unroll 2
      for (int s = 0; s < kSumsOfStep; ++s)
        for (int r = 0; r < TILE_N; ++r)
          for (int m = 0; m < M; ++m) part[r][m] = vfmaq_n_f32(part[r][m], acc[s][r][m], scales[r][i / RUN + s]);
    }
    for (int r = 0; r < TILE_N; ++r)
      for (int m = 0; m < M; ++m) total[r][m] = vaddq_f32(total[r][m], part[r][m]);
  }
  for (int r = 0; r < TILE_N; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = vaddvq_f32(total[r][m]) * args.bf16_code.scale;
}

template <int RUN, int TILE_N>
void dot_codes_of_any_m(const GemmArgs& args, const CodeTable& table, int64_t n, float sums[][kGemvMaxM]) {
  switch (args.M) {
    case 1: return dot_codes<RUN, /*M=*/1, TILE_N>(args, table, n, sums);
    case 2: return dot_codes<RUN, /*M=*/2, TILE_N>(args, table, n, sums);
    case 3: return dot_codes<RUN, /*M=*/3, TILE_N>(args, table, n, sums);
    default: return dot_codes<RUN, /*M=*/4, TILE_N>(args, table, n, sums);
  }
}

template <int RUN>
void gemv_code_runs(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const CodeTable table(args.bf16_code);
  for (int64_t n = n_begin; n < n_end;) {
    const int n_count = n + kGemvTileRows <= n_end ? kGemvTileRows : 1;
    float sums[kGemvTileRows][kGemvMaxM];
    if (n_count == 1)
      dot_codes_of_any_m<RUN, /*TILE_N=*/1>(args, table, n, sums);
    else
      dot_codes_of_any_m<RUN, kGemvTileRows>(args, table, n, sums);
    for (int r = 0; r < n_count; ++r, ++n) store_column<BFloat16>(args, n, sums[r]);
  }
}

// GemvFn.
void gemv_codes(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  switch (code_run(args.weight)) {
    case 16: return gemv_code_runs<16>(args, n_begin, n_end);
    case 32: return gemv_code_runs<32>(args, n_begin, n_end);
    default: return gemv_code_runs<64>(args, n_begin, n_end);
  }
}

}  // namespace
}  // namespace nf4::cpu
