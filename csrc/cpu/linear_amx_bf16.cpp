// linear in bf16 on AMX tiles, M > 3: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   gemm_amx_bf16.h.
// Work split   N tiles of 64 rows of W. The caller splits them over threads.
// Inner loop   W is the first operand, so that a row of it stays a row. A register holds 128 codes of a row as 32 words
//              of 4 nibbles; the tables of its two runs of 64 are one of 32 entries, and bit 4 of an index, set in the
//              high words, says which. So 4 x (shift, vpternlog, vpermw) give a row of 4 tiles, in an order of k that
//              is all the same, as x is packed in it, too.
// Rejected     W as the second operand: pairs of k of 16 rows of W meet in a row of a tile, a transpose for each.
//
//   word w of 128 k      codes 4w .. 4w + 3          nibble        3       2       1    0
//                                                    holds 4w +    2       3       0    1
//
//   tile v, row n        | k = 4w + (v ^ 1), w = 0 .. 31 |      the same of x, row p:  pairs (w 2p, w 2p + 1)
#include "gemm_amx_bf16.h"
#include "linear.h"
#include "linear_gemv_codes_int.h"

namespace nf4::cpu {
namespace {

constexpr int kRun = 64, kQuad = 2 * kRun;  // k that share a scale; k of four tiles

struct LinearTiles {
  static constexpr int kStep = kQuad;
  static constexpr bool kIsWeightFirst = true;
  static constexpr int kSumTile = 16 * kAmxRows, kSumRowBytes = 64;  // [n][m]

  // deal_by_four, to out[v], which lie `stride` apart.
  static void deal(const BFloat16* from, BFloat16* out, int64_t stride) {
    Isa::I quads[4];
    deal_by_four(from, quads);
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(out + v * stride, quads[v]);
  }

  static void pack(const BFloat16* x, int64_t stride, int64_t m_count, int64_t K, BFloat16* tiles) {
    alignas(64) BFloat16 dealt[4][kAmxRows][kAmxDepth], tail[kQuad];
    const uint8_t* rows[4][kAmxRows];
    for (int v = 0; v < 4; ++v)
      for (int m = 0; m < kAmxRows; ++m) rows[v][m] = reinterpret_cast<const uint8_t*>(dealt[v][m]);
    std::memset(static_cast<void*>(dealt), 0, sizeof dealt);
    for (int64_t k = 0; k < K; k += kQuad) {
      for (int64_t m = 0; m < m_count; ++m) {
        const BFloat16* from = x + m * stride + k;
        if (K - k < kQuad) convert_row(from, K - k, kQuad, tail);
        deal(K - k < kQuad ? tail : from, dealt[0][m], kAmxTile);
      }
      for (int v = 0; v < 4; ++v, tiles += kAmxTile) transpose_words(rows[v], kAmxRows, 64, tiles);
    }
  }

  // Row i of the first operand in the slice's first tile of that row.
  static BFloat16* row_of(BFloat16* slice, int64_t i) {
    return slice + i / kAmxRows * kAmxTile + i % kAmxRows * kAmxDepth;
  }
  static constexpr int64_t kNextStep = kAmxTiles * kAmxTile;

  static void decode(const Weight& w, int64_t n, int64_t k, int64_t k_count, BFloat16* slice) {
    const Isa::F levels = Isa::load(w.code);
    const Isa::I nibble = _mm512_set1_epi16(15);
    const Isa::I second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const int64_t runs = k_count / kRun;
    // In bytes: the same rows of the next slice, or the rows of the next group where it begins.
    const int64_t ahead = (k + kSliceD < w.K ? kSliceD : kAmxGroup * kAmxTileC * w.K - k) / 2;
    for (int64_t i = 0; i < kAmxTileC; ++i) {
      const int64_t first = (n + i < w.N ? n + i : w.N - 1) * w.K + k;
      const uint8_t* codes = w.packed + first / 2;
      prefetch_l2(codes + ahead);
      prefetch_l2(codes + ahead + 64);
      float scales[kSliceD / kRun];
      if (1 << w.block_shift == kRun)
        scales_of_blocks(w, first / kRun, runs, scales);
      else
        for (int64_t b = 0; b < runs; ++b) scales[b] = block_scale(w, (first + b * kRun) >> w.block_shift);
      BFloat16* out = row_of(slice, i);
      for (int64_t b = 0; b < runs; b += 2, codes += kQuad / 2) {
        const bool has_next = b + 1 < runs;  // else zeros, which a level that is NaN must not reach
        const Isa::I words = _mm512_maskz_loadu_epi64(has_next ? 0xff : 0x0f, codes);
        const Isa::F next = has_next ? Isa::mul(levels, Isa::set1(scales[b + 1])) : Isa::zero();
        const auto both = (Isa::I)_mm512_cvtne2ps_pbh(next, Isa::mul(levels, Isa::set1(scales[b])));
        const auto look_up = [&](Isa::I shifted) {
          const Isa::I index = _mm512_ternarylogic_epi32(shifted, nibble, second, 0xea);  // (shifted & nibble) | second
          _mm512_store_si512(out, _mm512_permutexvar_epi16(index, both));
          out += kNextStep;
        };
        look_up(words);
        look_up(_mm512_srli_epi16(words, 4));
        look_up(_mm512_srli_epi16(words, 8));
        look_up(_mm512_srli_epi16(words, 12));
      }
    }
  }

  // row_at(n, k, count, out): so many elements of row n.
  template <class RowAt>
  static void spread(RowAt row_at, int64_t n, int64_t left, int64_t k, int64_t k_count, BFloat16* slice) {
    alignas(64) BFloat16 row[kSliceD] = {};
    for (int64_t i = 0; i < kAmxTileC; ++i) {
      row_at(n + (i < left ? i : left - 1), k, k_count, row);
      BFloat16* out = row_of(slice, i);
      for (int64_t q = 0; q < k_count; q += kQuad, out += 4 * kNextStep) deal(row + q, out, kNextStep);
    }
  }

  static void store(const GemmArgs& args, int64_t m, int64_t m_count, int64_t n, int64_t left, const float* sums) {
    alignas(64) float natural[kAmxRows][kAmxTileC];
    for (int g = 0; g < kAmxTiles; ++g) {
      const uint8_t* rows[Isa::L];
      for (int i = 0; i < Isa::L; ++i) rows[i] = reinterpret_cast<const uint8_t*>(sums + g * kSumTile + i * kAmxRows);
      transpose_words(rows, kAmxRows, sizeof natural[0], natural[0] + g * 16);
    }
    for (int64_t i = 0; i < m_count; ++i) store_y(args, m + i, n, left < kAmxTileC ? left : kAmxTileC, natural[i]);
  }
};

void linear_tiles_amx(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  gemm_tiles<LinearTiles>(args, /*D=*/args.weight.K, /*C=*/args.weight.N, tile_begin, tile_end, workspace);
}

}  // namespace

const GemvKernel kGemvInt_amx_bf16 = describe_gemv_codes<IntTerms>();
const GemmKernel kLinear_amx_bf16 = describe_tiles<LinearTiles>(linear_tiles_amx);

}  // namespace nf4::cpu
