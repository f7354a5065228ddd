// linear in bf16 on AMX tiles, M > 3: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   gemm_amx_bf16.h.
// Work split   N tiles of 32 rows of W. The caller splits them over threads.
// Inner loop   W is the first operand, so that a row of it stays a row. A register holds 128 codes of a row as 32 words
//              of 4 nibbles; the tables of its two runs of 64 are one of 32 entries, and bit 4 of an index, set in the
//              high words, says which. So 4 x (shift, vpternlog, vpermw) give a row of 4 tiles, in an order of k that
//              is all the same, as x is packed in it, too.
// A last run   Where rows of W end with one run of 64, each of its tiles has two of the four nibbles: none is padded.
// Packing      8 k of 16 rows of x are transposed as 32-bit words, pairs of neighbours; then shifts and blends make the
//              pairs k, k + 4 of which tiles are.
// Rejected     W as the second operand: pairs of k of 16 rows of W meet in a row of a tile, a transpose for each.
//
//   word w of 128 k      codes 4w .. 4w + 3          nibble        3       2       1    0
//                                                    holds 4w +    2       3       0    1
//
//   tile v, row n        | k = 4w + (v ^ 1), w = 0 .. 31 |      the same of x, row p:  pairs (w 2p, w 2p + 1)
//   of a last run        | nibble 2v, w = 0 .. 15 | nibble 2v + 1 |
#include "gemm_amx_bf16.h"
#include "linear.h"
#include "linear_gemv_codes_int.h"

namespace nf4::cpu {
namespace {

constexpr int kRun = 64, kQuad = 2 * kRun;  // k that share a scale; k of four tiles

struct LinearTiles : TileShape<2> {
  static constexpr int kStep = kRun;
  static constexpr bool kIsWeightFirst = true;
  static constexpr int kSumTile = 16 * kAmxRows, kSumRowBytes = 64;  // [n][m]

  // The tiles have whatever x's first row has in columns [m_count, 16), whose sums are not stored.
  static void pack(const BFloat16* x, int64_t stride, int64_t m_count, int64_t K, BFloat16* tiles) {
    alignas(64) BFloat16 tail[kAmxRows][kRun];
    const uint8_t* rows[kAmxRows];
    for (int64_t k = 0; k < K; k += kRun) {
      for (int64_t i = 0; i < kAmxRows; ++i) {
        const BFloat16* from = x + (i < m_count ? i : 0) * stride + k;
        if (K - k < kRun) convert_row(from, K - k, kRun, tail[i]);
        rows[i] = reinterpret_cast<const uint8_t*>(K - k < kRun ? tail[i] : from);
      }
      const bool is_alone = k % kQuad == 0 && K - k <= kRun;
      BFloat16* out = tiles + k / kQuad * 4 * kAmxTile + k % kQuad / kRun * kAmxTile / 2;
      for (int p = 0; p < 8; ++p, out += kAmxDepth) {
        Isa::I pairs[4];  // k 0 and 1, 2 and 3, ... of 8
        Isa::load_transposed(rows, p * 16, pairs);
        const auto store = [&](int v, Isa::I pair) {
          _mm512_store_si512(out + v * (is_alone ? kAmxTile / 2 : kAmxTile), pair);
        };
        for (int v = 0; v < 4; v += 2) {  // k v and v + 4, v + 1 and v + 5
          const Isa::I low = pairs[v / 2], high = pairs[v / 2 + 2];
          store(v + 1, _mm512_mask_mov_epi16(low, 0xaaaaaaaa, _mm512_slli_epi32(high, 16)));
          store(v, _mm512_mask_mov_epi16(high, 0x55555555, _mm512_srli_epi32(low, 16)));
        }
      }
    }
  }

  // Row i of the first operand in the slice's first tile of that row.
  static BFloat16* row_of(BFloat16* slice, int64_t i) {
    return slice + i / kAmxRows * kAmxTile + i % kAmxRows * kAmxDepth;
  }
  static constexpr int64_t kNextStep = kTiles * kAmxTile;

  static void decode(const Weight& w, int64_t n, int64_t k, int64_t k_count, BFloat16* slice) {
    const Isa::F levels = Isa::load(w.code);
    const Isa::I nibble = _mm512_set1_epi16(15);
    const Isa::I second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const int64_t runs = k_count / kRun;
    // In bytes: the same rows of the next slice, or the rows of the next group where it begins.
    const int64_t ahead = (k + kSliceD < w.K ? kSliceD : kGroup * kTileC * w.K - k) / 2;
    for (int64_t i = 0; i < kTileC; ++i) {
      const int64_t first = (n + i < w.N ? n + i : w.N - 1) * w.K + k;
      const uint8_t* codes = w.packed + first / 2;
      for (int line = 0; line < kSliceD / 2; line += 64) prefetch_l2(codes + ahead + line);
      float scales[kSliceD / kRun];
      if (1 << w.block_shift == kRun)
        scales_of_blocks(w, first / kRun, runs, scales);
      else
        for (int64_t b = 0; b < runs; ++b) scales[b] = block_scale(w, (first + b * kRun) >> w.block_shift);
      BFloat16* out = row_of(slice, i);
      const auto look_up = [&](Isa::I index, Isa::I table) {
        _mm512_store_si512(out, _mm512_permutexvar_epi16(index, table));
        out += kNextStep;
      };
      for (int64_t b = 0; b < runs; b += 2, codes += kQuad / 2) {
        const Isa::F scaled = Isa::mul(levels, Isa::set1(scales[b]));
        if (b + 1 == runs) {
          const auto table = (Isa::I)_mm512_cvtne2ps_pbh(scaled, scaled);
          const Isa::I words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
          look_up(_mm512_srlv_epi16(words, half_shifts(0, 4)), table);
          look_up(_mm512_srlv_epi16(words, half_shifts(8, 12)), table);
          break;
        }
        const auto both = (Isa::I)_mm512_cvtne2ps_pbh(Isa::mul(levels, Isa::set1(scales[b + 1])), scaled);
        const Isa::I words = _mm512_loadu_si512(codes);
        const auto index = [&](Isa::I shifted) {  // (shifted & nibble) | second
          return _mm512_ternarylogic_epi32(shifted, nibble, second, 0xea);
        };
        look_up(index(words), both);
        look_up(index(_mm512_srli_epi16(words, 4)), both);
        look_up(index(_mm512_srli_epi16(words, 8)), both);
        look_up(index(_mm512_srli_epi16(words, 12)), both);
      }
    }
  }
  static Isa::I half_shifts(int low, int high) {
    return _mm512_inserti64x4(_mm512_set1_epi16(short(low)), _mm256_set1_epi16(short(high)), 1);
  }

  // row_at(n, k, count, out): so many elements of row n.
  template <class RowAt>
  static void spread(RowAt row_at, int64_t n, int64_t left, int64_t k, int64_t k_count, BFloat16* slice) {
    alignas(64) BFloat16 row[kSliceD] = {};
    for (int64_t i = 0; i < kTileC; ++i) {
      row_at(n + (i < left ? i : left - 1), k, k_count, row);
      BFloat16* out = row_of(slice, i);
      const auto store = [&](Isa::I words) {
        _mm512_store_si512(out, words);
        out += kNextStep;
      };
      for (int64_t q = 0; q < k_count; q += kQuad) {
        Isa::I quads[4];
        deal_by_four(row + q, quads);
        const auto join = [&](int v) { return _mm512_inserti64x4(quads[v], _mm512_castsi512_si256(quads[v + 1]), 1); };
        if (k_count - q <= kRun) {
          store(join(0));
          store(join(2));
        } else {
          for (int v = 0; v < 4; ++v) store(quads[v]);
        }
      }
    }
  }

  static void store(const GemmArgs& args, int64_t m, int64_t m_count, int64_t n, int64_t left, const float* sums) {
    alignas(64) float natural[kAmxRows][kTileC];
    for (int g = 0; g < kTiles; ++g) {
      const uint8_t* rows[Isa::L];
      for (int i = 0; i < Isa::L; ++i) rows[i] = reinterpret_cast<const uint8_t*>(sums + g * kSumTile + i * kAmxRows);
      transpose_words(rows, kAmxRows, sizeof natural[0], natural[0] + g * 16);
    }
    for (int64_t i = 0; i < m_count; ++i) store_y(args, m + i, n, left < kTileC ? left : kTileC, natural[i]);
  }
};

void linear_tiles_amx(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  gemm_tiles<LinearTiles>(args, /*D=*/args.weight.K, /*C=*/args.weight.N, tile_begin, tile_end, workspace);
}

}  // namespace

const GemvKernel kGemvInt_amx_bf16 = describe_gemv_codes<IntTerms>();
const GemmKernel kLinear_amx_bf16 = describe_tiles<LinearTiles>(linear_tiles_amx);

}  // namespace nf4::cpu
