// linear in fp16 on NEON, M <= 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   linear_gemv_codes_neon.h, then code_table_neon.h.
// Work split   Columns [n_begin, n_end) of y, two rows of W at a time. The caller splits them over threads.
// Inner loop   As in bf16, by a table of scaled levels for each run of 64, 32 or 16 k: fmlal multiplies fp16 exactly
//              and adds to fp32 sums, which need no scale any more.
// Rejected     fp32 (linear_gemv.h): 1.7 instructions a weight against 1.0 (M = 1). With more rows fp32 products stay:
//              fmlal multiplies no more than fmla of fp32 does.
// Bytes        Reads 0.52 B a weight (double-quantized).
// Needs        a code_run; other K, and fp32 rows, go to linear_gemv.h. W is rounded to fp16, as dense fp16 rounds it.
#include "codes_neon_bf16.h"
#include "linear_gemv.h"

namespace nf4::cpu {
namespace {

constexpr int kGroupK = 32;    // k of one load of codes
constexpr int kChunkK = 1024;  // k whose sums start anew

bool is_of_codes(Dtype dtype, int64_t K) { return dtype == Dtype::kFloat16 && K > 0 && K % 64 == 0; }

// GemvPackFn. A panel of fp16 takes half of the bytes that gemv_row_bytes says.
void pack_halves(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel) {
  if (is_of_codes(dtype, K)) return pack_even_odd(x, M, K, panel);
  gemv_pack(x, dtype, M, K, panel);
}

// sums[r][m] = x[m, :] . W[n + r, :], r < TILE_N
template <int RUN, int M, int TILE_N>
void dot_halves(const GemmArgs& args, const float32x4x4_t& levels, int64_t n, float sums[][kGemvMaxM]) {
  constexpr int kStepK = RUN == 64 ? 64 : kGroupK, kTables = RUN == 16 ? 2 : 1;
  const Weight& w = args.weight;
  const auto* x = static_cast<const Float16*>(args.panel);
  const uint8_t* packed = w.packed + n * (w.K / 2);
  float32x4_t total[TILE_N][M];
  for (int r = 0; r < TILE_N; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = vdupq_n_f32(0);
  for (int64_t chunk = 0; chunk < w.K; chunk += kChunkK) {
    const int64_t left = w.K - chunk, count = left < kChunkK ? left : kChunkK;
    float scales[TILE_N][kChunkK / RUN];
    float32x4_t part[TILE_N][M][2];  // of the low and the high halves of registers
    for (int r = 0; r < TILE_N; ++r) {
      const int64_t first = (n + r) * w.K + chunk;
      gather_scales(w, count / RUN, [&](int64_t b) { return (first + b * RUN) >> w.block_shift; }, scales[r]);
      for (int m = 0; m < M; ++m) part[r][m][0] = part[r][m][1] = vdupq_n_f32(0);
    }
    for (int64_t i = 0; i < count; i += kStepK) {
      __builtin_prefetch(packed + (TILE_N * (w.K + chunk + i)) / 2);
      const auto table = [&](int r, int t) { return CodeTable(Float16{}, levels, scales[r][i / RUN + t]); };
      const CodeTable tables[2][2] = {{table(0, 0), table(0, kTables - 1)},
                                      {table(TILE_N - 1, 0), table(TILE_N - 1, kTables - 1)}};
#pragma GCC unroll 2
      for (int64_t at = i; at < i + kStepK; at += kGroupK) {
        uint16x8_t values[TILE_N][4], unused;
        for (int r = 0; r < TILE_N; ++r) {
          const uint8x16_t bytes = vld1q_u8(packed + (r * w.K + chunk + at) / 2);
          const uint8x16_t codes[2] = {even_codes(bytes), odd_codes(bytes)};
          for (int parity = 0; parity < 2; ++parity) {
            tables[r][0].values(codes[parity], values[r][2 * parity], values[r][2 * parity + 1]);
            if (kTables == 2) tables[r][1].values(codes[parity], unused, values[r][2 * parity + 1]);
          }
        }
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const auto xm = vreinterpretq_f16_u16(Isa::load_bits(x + (chunk + at) * M + m * kGroupK + 8 * v));
            for (int r = 0; r < TILE_N; ++r) {
              const float16x8_t weights = vreinterpretq_f16_u16(values[r][v]);
              part[r][m][0] = vfmlalq_low_f16(part[r][m][0], weights, xm);
              part[r][m][1] = vfmlalq_high_f16(part[r][m][1], weights, xm);
            }
          }
      }
    }
    for (int r = 0; r < TILE_N; ++r)
      for (int m = 0; m < M; ++m) total[r][m] = vaddq_f32(total[r][m], vaddq_f32(part[r][m][0], part[r][m][1]));
  }
  for (int r = 0; r < TILE_N; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = vaddvq_f32(total[r][m]);
}

template <int RUN, int M>
void dot_rows(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const float32x4x4_t levels = vld1q_f32_x4(args.weight.code);
  for (int64_t n = n_begin; n < n_end;) {
    float sums[2][kGemvMaxM];
    const int n_count = n + 2 <= n_end ? 2 : 1;
    if (n_count == 2)
      dot_halves<RUN, M, /*TILE_N=*/2>(args, levels, n, sums);
    else
      dot_halves<RUN, M, /*TILE_N=*/1>(args, levels, n, sums);
    for (int r = 0; r < n_count; ++r, ++n) store_column<Float16>(args, n, sums[r]);
  }
}

template <int RUN>
void dot_rows_of_any_m(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  switch (args.M) {
    case 1: return dot_rows<RUN, /*M=*/1>(args, n_begin, n_end);
    case 2: return dot_rows<RUN, /*M=*/2>(args, n_begin, n_end);
    case 3: return dot_rows<RUN, /*M=*/3>(args, n_begin, n_end);
    default: return dot_rows<RUN, /*M=*/4>(args, n_begin, n_end);
  }
}

// GemvFn.
void gemv_halves(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  if (!is_of_codes(args.dtype, args.weight.K)) return linear_gemv(args, n_begin, n_end);
  switch (code_run(args.weight)) {
    case 16: return dot_rows_of_any_m<16>(args, n_begin, n_end);
    case 32: return dot_rows_of_any_m<32>(args, n_begin, n_end);
    default: return dot_rows_of_any_m<64>(args, n_begin, n_end);
  }
}

}  // namespace

const GemvKernel kGemv_neon_bf16{kGemvMaxM, gemv_row_bytes, pack_halves, gemv_halves};

}  // namespace nf4::cpu
