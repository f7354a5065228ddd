// linear_dgrad in bf16 on NEON: dX[m, k] = sum_n dY[m, n] * W[n, k], W scaled and rounded to bf16 once for all M
//
// Read first   linear_dgrad.h, then gemm_neon_bf16.h and codes_neon_bf16.h.
// Work split   K tiles of 16 k, 4 at a time. The caller splits them over threads.
// Inner loop   4 rows of W, the d of a bfmmla, are zipped while they are packed bytes; codes are looked up as bf16 and
//              widened, meet the 4 rows' scales and are rounded: 1.3 instructions a weight, as long as the products of
//              20 rows of dY.
// Rejected     Levels in fp32: 12 instructions of lookup for 16 weights against 4 and 4 that widen.
// Flops        2*M*N*K at 32 a bfmmla.
// Needs        K % 16 == 0 for this path; other K decode by linear_dgrad.h.
//
//   8 bytes of rows n .. n+3, zipped        | byte 0 of n, n+1, n+2, n+3 | byte 1 of .. | .. 3 |   and bytes 4 .. 7
//   even codes of 16 such bytes, looked up  | k 0: n .. n+3 | k 2: n .. n+3 |   | k 4: .. | k 6: .. |
//   columns of a tile                       c 0 .. 7: even k 0 .. 14, c 8 .. 15: odd k
#include "gemm_neon_bf16.h"
#include "linear_dgrad.h"

namespace nf4::cpu {
namespace {

struct DgradBf16 : Bf16Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kDgradGroup;
};

static inline bfloat16x8_t scaled(bfloat16x8_t values, float32x4_t scales) {
  const uint16x8_t bits = vreinterpretq_u16_bf16(values);
  const float32x4_t low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16));
  const float32x4_t high = vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16));
  return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(vmulq_f32(low, scales)), vmulq_f32(high, scales));
}

// 16 k of 4 rows of W, whose bytes lie row_bytes apart, into a tile's columns. Rows from `rows` on are zeros: their
// scale is, and they are not read.
static inline void decode_four_rows(const CodeTable& table, const uint8_t* first, int64_t row_bytes, int64_t rows,
                                    float32x4_t scales, BFloat16* out) {
  uint8x16_t row[4];
  for (int r = 0; r < 4; ++r) {
    const uint8x8_t bytes = vld1_u8(r < rows ? first + r * row_bytes : first);
    row[r] = vcombine_u8(bytes, bytes);
  }
  const uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(row[0], row[1]));
  const uint16x8_t b = vreinterpretq_u16_u8(vzip1q_u8(row[2], row[3]));
  const uint8x16_t zipped[2] = {vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))};
  for (int half = 0; half < 2; ++half, out += 16) {
    bfloat16x8_t pairs[2];
    table.values(even_codes(zipped[half]), pairs[0], pairs[1]);
    for (int i = 0; i < 2; ++i) store_bf16(out + 8 * i, scaled(pairs[i], scales));
    table.values(odd_codes(zipped[half]), pairs[0], pairs[1]);
    for (int i = 0; i < 2; ++i) store_bf16(out + 32 + 8 * i, scaled(pairs[i], scales));
  }
}

// The same of any K, k_count k of them, by the fp32 levels.
static inline void decode_four_rows_of_any_k(const Weight& w, const Isa::Table& table, int64_t n, int64_t k,
                                             int64_t k_count, BFloat16* out) {
  uint16x8_t even[4], odd[4];
  for (int r = 0; r < 4; ++r) {
    Isa::F evens = Isa::zero(), odds = Isa::zero();
    if (n + r < w.N) decode_even_odd(w, table, n + r, k, k_count, evens, odds);
    even[r] = Isa::round_bf16(evens);
    odd[r] = Isa::round_bf16(odds);
  }
  const auto store_transposed = [](const uint16x8_t(&rows)[4], BFloat16* to) {
    const uint32x4_t a = vreinterpretq_u32_u16(vzip1q_u16(rows[0], rows[1]));
    const uint32x4_t b = vreinterpretq_u32_u16(vzip1q_u16(rows[2], rows[3]));
    const uint32x4_t c = vreinterpretq_u32_u16(vzip2q_u16(rows[0], rows[1]));
    const uint32x4_t d = vreinterpretq_u32_u16(vzip2q_u16(rows[2], rows[3]));
    Isa::store_bits(to, vreinterpretq_u16_u32(vzip1q_u32(a, b)));
    Isa::store_bits(to + 8, vreinterpretq_u16_u32(vzip2q_u32(a, b)));
    Isa::store_bits(to + 16, vreinterpretq_u16_u32(vzip1q_u32(c, d)));
    Isa::store_bits(to + 24, vreinterpretq_u16_u32(vzip2q_u32(c, d)));
  };
  store_transposed(even, out);
  store_transposed(odd, out + 32);
}

// GemmFn.
void linear_dgrad_bf16(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  using Core = DgradBf16;
  const Weight& w = args.weight;
  const CodeTable table(args.bf16_code);
  const Isa::Table levels = Isa::load_table(w.code);
  const int64_t run = w.block_shift < 6 ? int64_t(1) << w.block_shift : 64, row_bytes = w.K / 2;
  const auto decode_tile = [&](int64_t n, int64_t n_count, int64_t k, const float* scales, BFloat16* slice) {
    for (int64_t i = 0; i < n_count; i += 4, slice += 4 * kTileK)
      decode_four_rows(table, w.packed + (n + i) * row_bytes + k / 2, row_bytes, w.N - n - i, vld1q_f32(scales + i),
                       slice);
  };
  const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, Core::Slice* slices) {
    const int64_t there = w.N - n < n_count ? w.N - n : n_count;
    float scales[kSliceD];
    for (int64_t i = there; i < n_count; ++i) scales[i] = 0;
    for (int64_t c = 0; c < k_count; c += kTileK, ++slices) {
      if (w.K % 16 != 0) {
        const int64_t here = k_count - c < kTileK ? k_count - c : kTileK;
        for (int64_t i = 0; i < n_count; i += 4)
          decode_four_rows_of_any_k(w, levels, n + i, k + c, here, *slices + i * kTileK);
        continue;
      }
      const bool is_same_run = c > 0 && (k + c) % run != 0 && w.K % run == 0;
      const auto block = [&](int64_t i) { return ((n + i) * w.K + k + c) >> w.block_shift; };
      if (!is_same_run) gather_scales(w, there, args.bf16_code.scale, block, scales);
      decode_tile(n, n_count, k + c, scales, *slices);
    }
    // The next rows: they lie K/2 bytes apart, further than hardware looks ahead.
    for (int64_t i = n_count; i < 2 * n_count; ++i) __builtin_prefetch(w.packed + ((n + i) * w.K + k) / 2);
  };
  const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
    auto* dx = static_cast<BFloat16*>(args.out) + m * w.K + k;
    const Isa::F even = Isa::load(sums), odd = Isa::load(sums + Isa::L);
    if (k_count == kTileK) return Isa::store_pairs(dx, even, odd);
    BFloat16 whole[kTileK];
    Isa::store_pairs(whole, even, odd);
    std::memcpy(static_cast<void*>(dx), whole, size_t(k_count) * sizeof(BFloat16));
  };
  gemm<Core>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace

const GemmKernel kLinearDgrad_neon_bf16 = describe_gemm<DgradBf16>(pack_bf16, linear_dgrad_bf16);

}  // namespace nf4::cpu
