// linear of int8 weights, M > 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   linear.h, whose cores multiply what is decoded here.
// Inner loop   16 bytes of each of L rows of W are transposed, and byte b of every word is one k of L columns of y: two
//              shifts, a conversion and a product.
// The trick    A slice of each row is copied next to the others' first. Where K is a multiple of 4096, 16 rows lie in one
//              set of 8 lines of the L1, and each line would come four times from the L2: 6.1 to 5.6 ms at M = 16.
// Prefetch     The next slice of each row, a line or two for each 16 k that are decoded: all at once they hold the copy
//              up, 5.6 to 5.0 ms (both 4096x4096, bf16, one core of a Zen 4 EPYC).
// Rejected     x rounded to int8, so that vpdpbusd could multiply: y would no longer be W's product with x.
// Needs        K % 16 == 0 for the transposed path; other K decode whole spans first.
#pragma once

#include "decode_int8.h"
#include "linear.h"

namespace nf4::cpu {
namespace {

constexpr int kNearBytes = kSliceD + 64;  // of a row: one set of the cache apart from the next row

// W[n .. n + n_count, k .. k + k_count], transposed, into a slice; its columns past n_count repeat the last one.
template <class Core>
void decode_tile_int8(const Weight& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                      typename Core::Element* slice) {
  const bool scale_changes_inside = w.K % (int64_t(1) << w.block_shift) != 0;
  const int64_t block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = n + v * Isa::L < n + n_count ? n + v * Isa::L : n + n_count - 1;
    const int64_t here = n + n_count - first < Isa::L ? n + n_count - first : Isa::L;
    uint8_t near[Isa::L][kNearBytes];
    const uint8_t *rows[Isa::L], *next[Isa::L];
    for (int64_t r = 0; r < Isa::L; ++r) {
      const uint8_t* row = w.packed + (first + (r < here ? r : here - 1)) * w.K + k;
      next[r] = row + k_count;
      if (k_count == kSliceD)
        std::memcpy(near[r], row, kSliceD);  // of a size that the compiler knows: no call
      else
        std::memcpy(near[r], row, size_t(k_count));
      rows[r] = near[r];
    }
    Isa::F scale = scales_of_rows(w, first, here, k);
    for (int64_t i = 0; i < k_count; i += 16) {
      if (i > 0 && (((k + i) & block_mask) == 0 || scale_changes_inside)) scale = scales_of_rows(w, first, here, k + i);
      constexpr int64_t kLines = Isa::L / 4;  // of 4 L in a slice of L rows
      for (int64_t line = i / 16 * kLines; line < (i / 16 + 1) * kLines; ++line)
        __builtin_prefetch(next[line % Isa::L] + line / Isa::L * 64);
      Isa::I words[4];
      Isa::load_transposed(rows, i, words);
      typename Core::Element* out = slice + i * kTileN + v * Isa::L * Core::kStep;
      for (int j = 0; j < 4; ++j, out += 4 * kTileN) {
        Core::store_k_pair(out, Isa::mul(Isa::template signed_byte<0>(words[j]), scale),
                           Isa::mul(Isa::template signed_byte<1>(words[j]), scale));
        Core::store_k_pair(out + 2 * kTileN, Isa::mul(Isa::template signed_byte<2>(words[j]), scale),
                           Isa::mul(Isa::template signed_byte<3>(words[j]), scale));
      }
    }
  }
}

// GemmFn.
template <class Core>
void linear_int8_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, typename Core::Slice* slice) {
    if (w.K % 16 == 0) return decode_tile_int8<Core>(w, n, n_count, k, k_count, *slice);
    spread_spans<Core>(w, n, n_count, k, k_count, *slice,
                       [&](int64_t begin, int64_t count, auto* out) { decode_int8(w, begin, count, out); });
  };
  const auto store = [&](int64_t m, int64_t n, int64_t n_count, const float* sums) {
    store_y(args, m, n, n_count, sums);
  };
  gemm<Core>(args, /*D=*/w.K, /*C=*/w.N, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace
}  // namespace nf4::cpu
