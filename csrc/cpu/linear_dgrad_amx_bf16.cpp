// linear_dgrad in bf16 on AMX tiles: dX[m, k] = sum_n dY[m, n] * W[n, k]
//
// Read first   gemm_amx_bf16.h, then codes_avx512.h.
// Work split   K tiles of 64 k. The caller splits them over threads.
// Inner loop   W is the second operand, whose rows are pairs (n, n + 1). A register holds 64 k of both, and both
//              blocks' tables are one of 32 entries: bit 4 of an index, set in the high words, says which row it is of.
//              So 4 x (shift, vpternlog, vpermw) give the rows of 4 tiles.
//
//   32 bits of lane j       codes k 4j .. 4j + 3 of two rows of W
//
//     nibble        7  6  5  4 | 3  2  1  0
//     holds 4j +    2  3  0  1 | 2  3  0  1
//                   row n + 1  | row n
//
//   tile v holds the columns k = 4j + (v ^ 1), as in linear_dgrad_codes.h; store puts them in order.
#include "gemm_amx_bf16.h"

namespace nf4::cpu {
namespace {

struct DgradTiles : TileShape<4> {
  static constexpr int kStep = kAmxDepth;
  static constexpr bool kIsWeightFirst = false;
  static constexpr int kSumTile = 16, kSumRowBytes = kTileC * 4;  // [m][64], by tiles

  static void pack(const BFloat16* dy, int64_t stride, int64_t m_count, int64_t N, BFloat16* tiles) {
    for (int64_t n = 0; n < N; n += kAmxDepth, tiles += kAmxTile) {
      for (int64_t m = 0; m < m_count; ++m)
        convert_row(dy + m * stride + n, N - n < kAmxDepth ? N - n : kAmxDepth, kAmxDepth, tiles + m * kAmxDepth);
      std::memset(static_cast<void*>(tiles + m_count * kAmxDepth), 0, size_t(kAmxRows - m_count) * 64);
    }
  }

  // An index that takes a word of the first half, of row n, and one of the second, of row n + 1, in turn.
  static Isa::I words_in_turn() {
    alignas(64) uint16_t index[32];
    for (int j = 0; j < 32; ++j) index[j] = uint16_t(j / 2 + j % 2 * 16);
    return _mm512_load_si512(index);
  }

  // Rows n, n + 1 of the slice's first tile of them.
  static BFloat16* pair_of(BFloat16* slice, int64_t n) {
    return slice + n / kAmxDepth * kTiles * kAmxTile + n % kAmxDepth / 2 * 32;
  }

  static void decode(const Weight& w, int64_t k, int64_t n, int64_t n_count, BFloat16* slice) {
    const Isa::F levels = Isa::load(w.code);
    const Isa::I nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16);
    const Isa::I in_turn = words_in_turn();
    const int64_t row_bytes = w.K / 2, padded = round_up(n_count, kStep);
    // In bytes: the same columns of the next slice, or of the next group where it begins.
    const int64_t ahead = n + kSliceD < w.N ? kSliceD * row_bytes : kGroup * kTileC / 2 - n * row_bytes;
    const uint8_t* row = w.packed + n * row_bytes + k / 2;
    alignas(64) float scales[kSliceD];
    for (int64_t i = 0; i < n_count; i += Isa::L) {
      const int here = n_count - i < Isa::L ? int(n_count - i) : Isa::L;
      const auto block = [&](int r) { return ((n + i + r) * w.K + k) >> w.block_shift; };
      Isa::F values;
      gather_scales<64>(w, here, block, gather_superblocks(w, here, block), &values);
      Isa::store(scales + i, values);
    }
    for (int64_t i = 0; i < padded; i += 2, row += 2 * row_bytes) {
      BFloat16* out = pair_of(slice, i);
      prefetch_l2(row + ahead);
      prefetch_l2(row + row_bytes + ahead);
      Isa::F first = Isa::zero(), next = Isa::zero();
      Isa::I codes = _mm512_setzero_si512();
      if (i < n_count) {
        first = Isa::mul(levels, Isa::set1(scales[i]));
        codes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      }
      if (i + 1 < n_count) {
        next = Isa::mul(levels, Isa::set1(scales[i + 1]));
        codes = _mm512_inserti64x4(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + row_bytes)), 1);
      }
      codes = _mm512_permutexvar_epi16(in_turn, codes);
      const auto both = (Isa::I)_mm512_cvtne2ps_pbh(next, first);
      const auto lookup = [&](Isa::I shifted) {  // (shifted & nibble) | second
        return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(shifted, nibble, second, 0xea), both);
      };
      _mm512_store_si512(out, lookup(codes));
      _mm512_store_si512(out + kAmxTile, lookup(_mm512_srli_epi16(codes, 4)));
      _mm512_store_si512(out + 2 * kAmxTile, lookup(_mm512_srli_epi16(codes, 8)));
      _mm512_store_si512(out + 3 * kAmxTile, lookup(_mm512_srli_epi16(codes, 12)));
    }
  }

  // row_at(n, k, count, out): so many elements of row n.
  template <class RowAt>
  static void spread(RowAt row_at, int64_t k, int64_t left, int64_t n, int64_t n_count, BFloat16* slice) {
    alignas(64) BFloat16 pair[2][kTileC] = {};
    const Isa::I in_turn = words_in_turn();
    for (int64_t i = 0; i < round_up(n_count, kStep); i += 2) {
      for (int r = 0; r < 2; ++r) {
        if (i + r < n_count)
          row_at(n + i + r, k, left < kTileC ? left : kTileC, pair[r]);
        else
          std::memset(static_cast<void*>(pair[r]), 0, sizeof pair[r]);
      }
      Isa::I quads[kTiles];
      deal_by_four(pair[0], quads);
      BFloat16* out = pair_of(slice, i);
      for (int v = 0; v < kTiles; ++v, out += kAmxTile)
        _mm512_store_si512(out, _mm512_permutexvar_epi16(in_turn, quads[v]));
    }
  }

  static void store(const GemmArgs& args, int64_t m, int64_t m_count, int64_t k, int64_t left, const float* sums) {
    const int64_t k_count = left < kTileC ? left : kTileC;
    for (int64_t i = 0; i < m_count; ++i) store_in_order(sums + i * kTileC, args, m + i, k, k_count);
  }
};

void linear_dgrad_tiles_amx(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  gemm_tiles<DgradTiles>(args, /*D=*/args.weight.N, /*C=*/args.weight.K, tile_begin, tile_end, workspace);
}

}  // namespace

const GemmKernel kLinearDgrad_amx_bf16 = describe_tiles<DgradTiles>(linear_dgrad_tiles_amx);

}  // namespace nf4::cpu
