// linear in bf16 on NEON, M > 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   gemm_neon_bf16.h, then codes_neon_bf16.h.
// Work split   N tiles of 16 rows of W. The caller splits them over threads.
// Inner loop   Two rows of W become bf16 in L1, once for all M: 16 codes of each by a table of levels that are scaled
//              already, 1 instruction a weight.
// Rejected     Looking unscaled codes up again for each M tile, as linear_codes.h does: on NEON a lookup takes as long
//              as the products of 6 rows, where vpermw takes a fifth of them. Unscaled codes in L1, whose sums meet the
//              scales: 80 instructions in 576 of the products, against 10 for 64 weights, once.
// Flops        2*M*N*K at 32 a bfmmla.
// Needs        a code_run; other K decode whole spans first.
//
//   8 bytes of a row, even and odd codes zipped, looked up   | k 0 .. 7 |  | k 8 .. 15 |
//   64-bit halves of rows n and n+1, zipped                  | n: k 0-3 | n+1: k 0-3 |  | n: k 4-7 | n+1: k 4-7 | ..
#include "gemm_neon_bf16.h"
#include "linear.h"
#include "linear_gemv_codes_neon.h"

namespace nf4::cpu {
namespace {

struct LinearBf16 : Bf16Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1;
};

// k_count k of rows n and n+1 of W into two columns of a slice; `run` of them share a scale.
static inline void decode_two_rows(const float32x4x4_t& levels, const uint8_t* const (&rows)[2],
                                   const float (&scales)[2][kSliceD / kMinBlockSize], int64_t run, int64_t k_count,
                                   BFloat16* out) {
  constexpr int kStepOfSlice = 4 * kTileN;
  for (int64_t block = 0; block < k_count / run; ++block) {
    const CodeTable tables[2] = {{BFloat16{}, levels, scales[0][block]}, {BFloat16{}, levels, scales[1][block]}};
    for (int64_t k = block * run; k < (block + 1) * run; k += 16, out += 4 * kStepOfSlice) {
      uint64x2_t first[2], last[2];
      for (int r = 0; r < 2; ++r) {
        const uint8x16_t bytes = load_8_bytes(rows[r] + k / 2);
        uint16x8_t halves[2];
        tables[r].values(vzip1q_u8(even_codes(bytes), odd_codes(bytes)), halves[0], halves[1]);
        first[r] = vreinterpretq_u64_u16(halves[0]);
        last[r] = vreinterpretq_u64_u16(halves[1]);
      }
      Isa::store_bits(out, vreinterpretq_u16_u64(vzip1q_u64(first[0], first[1])));
      Isa::store_bits(out + kStepOfSlice, vreinterpretq_u16_u64(vzip2q_u64(first[0], first[1])));
      Isa::store_bits(out + 2 * kStepOfSlice, vreinterpretq_u16_u64(vzip1q_u64(last[0], last[1])));
      Isa::store_bits(out + 3 * kStepOfSlice, vreinterpretq_u16_u64(vzip2q_u64(last[0], last[1])));
    }
  }
}

// GemmFn.
void linear_bf16(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const float32x4x4_t levels = vld1q_f32_x4(w.code);
  const int64_t run = code_run(w);
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, LinearBf16::Slice* slice) {
    if (run == 0) return decode_tile_spans<LinearBf16>(w, n, n_count, k, k_count, *slice);
    for (int64_t c = 0; c < kTileN; c += 2) {
      const uint8_t* rows[2];
      float scales[2][kSliceD / kMinBlockSize];
      for (int r = 0; r < 2; ++r) {
        const int64_t first = (n + (c + r < n_count ? c + r : n_count - 1)) * w.K + k;
        rows[r] = w.packed + first / 2;
        // The next slice: the rows lie K/2 bytes apart, further than hardware looks ahead.
        for (int64_t line = 0; line < k_count / 2; line += 64) __builtin_prefetch(rows[r] + k_count / 2 + line);
        gather_scales(w, k_count / run, [&](int64_t b) { return (first + b * run) >> w.block_shift; }, scales[r]);
      }
      decode_two_rows(levels, rows, scales, run, k_count, *slice + c * LinearBf16::kStep);
    }
  };
  const auto store = [&](int64_t m, int64_t n, int64_t n_count, const float* sums) {
    store_y(args, m, n, n_count, sums);
  };
  gemm<LinearBf16>(args, /*D=*/w.K, /*C=*/w.N, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace

const GemvKernel kGemvCodes_neon_bf16{kGemvMaxM, gemv_codes_row_bytes, gemv_codes_pack, gemv_codes};
const GemmKernel kLinear_neon_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_bf16);

}  // namespace nf4::cpu
