// linear_dgrad in bf16 on NEON: dX[m, k] = sum_n dY[m, n] * W[n, k]
//
// Read first   linear_dgrad.h, then gemm_neon_bf16.h and codes_neon_bf16.h.
// Work split   K tiles of 16 k, 4 at a time. The caller splits them over threads.
// Inner loop   4 rows of W, the d of a bfmmla, become bf16 in L1, once for all M: 16 codes of each by a table of levels
//              that are scaled already, then a transpose: 1.1 instructions a weight.
// Rejected     Unscaled codes and a scaled dY, as in linear_dgrad_codes.h: dY is scaled anew for each 64 k, predicted
//              0.023 cycles a weight for each 6 rows (Neoverse V1), where scaling the levels takes 0.04 once.
// Flops        2*M*N*K at 32 a bfmmla.
// Needs        a code_run; other K decode by linear_dgrad.h.
//
//   8 bytes of a row, even then odd codes, looked up    | k 0 2 .. 14 |  | k 1 3 .. 15 |      columns 0-7, 8-15
//   those of rows n .. n+3, transposed                  | k 0: n .. n+3 | k 2: n .. n+3 |  ..
#include "gemm_neon_bf16.h"
#include "linear_dgrad.h"

namespace nf4::cpu {
namespace {

struct DgradBf16 : Bf16Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kDgradGroup;
};
constexpr int kDgradStep = DgradBf16::kStep;  // rows of W that meet in a register

// 8 k of 4 rows of W into 8 columns of a slice.
static inline void store_transposed(const uint16x8_t (&rows)[4], BFloat16* out) {
  const uint32x4_t a = vreinterpretq_u32_u16(vzip1q_u16(rows[0], rows[1]));
  const uint32x4_t b = vreinterpretq_u32_u16(vzip1q_u16(rows[2], rows[3]));
  const uint32x4_t c = vreinterpretq_u32_u16(vzip2q_u16(rows[0], rows[1]));
  const uint32x4_t d = vreinterpretq_u32_u16(vzip2q_u16(rows[2], rows[3]));
  Isa::store_bits(out, vreinterpretq_u16_u32(vzip1q_u32(a, b)));
  Isa::store_bits(out + 8, vreinterpretq_u16_u32(vzip2q_u32(a, b)));
  Isa::store_bits(out + 16, vreinterpretq_u16_u32(vzip1q_u32(c, d)));
  Isa::store_bits(out + 24, vreinterpretq_u16_u32(vzip2q_u32(c, d)));
}

// 16 k of 4 rows of W, whose bytes are at `rows`, into a slice.
static inline void decode_four_rows(const CodeTable (&tables)[4], const uint8_t* const (&rows)[4], int64_t byte,
                                    BFloat16* out) {
  uint16x8_t even[4], odd[4];
  for (int r = 0; r < 4; ++r) {
    const uint8x16_t bytes = load_8_bytes(rows[r] + byte);
    const uint64x2_t even_half = vreinterpretq_u64_u8(even_codes(bytes));
    const uint64x2_t odd_half = vreinterpretq_u64_u8(odd_codes(bytes));
    tables[r].values(vreinterpretq_u8_u64(vzip1q_u64(even_half, odd_half)), even[r], odd[r]);
  }
  store_transposed(even, out);
  store_transposed(odd, out + kDgradStep * Isa::L);
}

// k_count k, at most 64, of rows [n, n + n_count) into slices of 16 k; zeros for rows past the end.
static inline void decode_group(const Weight& w, int64_t run, int64_t k, int64_t k_count, int64_t n, int64_t n_count,
                                DgradBf16::Slice* slices) {
  const int64_t row_bytes = w.K / 2, there = w.N - n < n_count ? w.N - n : n_count;
  const uint8_t* first = w.packed + n * row_bytes + k / 2;
  const auto begins_run = [&](int64_t c) { return c == 0 || ((k + c) & (run - 1)) == 0; };
  float scales[kDgradGroup][kSliceD];
  for (int64_t c = 0; c < k_count; c += kTileK) {
    if (!begins_run(c)) continue;
    float* own = scales[c / kTileK];
    gather_scales(w, there, [&](int64_t i) { return ((n + i) * w.K + k + c) >> w.block_shift; }, own);
    for (int64_t i = there; i < n_count; ++i) own[i] = 0;
  }
  const float32x4x4_t levels = vld1q_f32_x4(w.code);
  for (int64_t i = 0; i < n_count; i += kDgradStep) {
    const uint8_t* rows[kDgradStep];
    for (int r = 0; r < kDgradStep; ++r) {
      rows[r] = first + (i + r < there ? i + r : there - 1) * row_bytes;
      // Rows lie K/2 bytes apart, further than hardware looks ahead.
      __builtin_prefetch(rows[r] + n_count * row_bytes);
    }
    for (int64_t c = 0; c < k_count;) {
      const float* own = scales[c / kTileK] + i;
      const auto table = [&](int r) { return CodeTable(BFloat16{}, levels, own[r]); };
      const CodeTable tables[kDgradStep] = {table(0), table(1), table(2), table(3)};
      do {
        decode_four_rows(tables, rows, c / 2, slices[c / kTileK] + i * kTileK);
        c += kTileK;
      } while (c < k_count && !begins_run(c));
    }
  }
}

// The same of any K, k_count k of one slice.
static inline void decode_slice_of_any_k(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count,
                                         BFloat16* slice) {
  const Isa::Table table = Isa::load_table(w.code);
  for (int64_t i = 0; i < n_count; i += kDgradStep, slice += kDgradStep * kTileK) {
    uint16x8_t even[kDgradStep], odd[kDgradStep];
    for (int r = 0; r < kDgradStep; ++r) {
      Isa::F evens = Isa::zero(), odds = Isa::zero();
      if (n + i + r < w.N) decode_even_odd(w, table, n + i + r, k, k_count, evens, odds);
      even[r] = Isa::round_to(BFloat16{}, evens);
      odd[r] = Isa::round_to(BFloat16{}, odds);
    }
    store_transposed(even, slice);
    store_transposed(odd, slice + kDgradStep * Isa::L);
  }
}

// GemmFn.
void linear_dgrad_bf16(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const int64_t run = code_run(w);
  const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, DgradBf16::Slice* slices) {
    if (run != 0) return decode_group(w, run, k, k_count, n, n_count, slices);
    for (int64_t c = 0; c < k_count; c += kTileK)
      decode_slice_of_any_k(w, k + c, k_count - c < kTileK ? k_count - c : kTileK, n, n_count, *slices++);
  };
  const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
    store_dx<BFloat16>(args, m, k, k_count, sums);
  };
  gemm<DgradBf16>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace

const GemmKernel kLinearDgrad_neon_bf16 = describe_gemm<DgradBf16>(pack_bf16, linear_dgrad_bf16);

}  // namespace nf4::cpu
