// linear of int8 weights, M <= 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   linear_gemv.h, which does the same of 4 bits.
// Inner loop   L bytes become fp32 and meet each row of x by an FMA; the scale comes once a block, to the fp32 sums.
// Bytes        1.02 a weight (double-quantized, block size 64), twice those of 4 bits.
// Needs        |x| summed over a block, times 127, in fp32's range. What of a block is no whole register goes alone.
//
//   panel: fp32 [M][K], in x's order
#pragma once

#include "decode_int8.h"
#include "linear_gemv.h"

namespace nf4::cpu {
namespace {

// GemvPackFn.
void gemv_int8_pack(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel) {
  float* out = static_cast<float*>(panel);
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    int64_t i = 0;
    for (; i + Isa::L <= M * K; i += Isa::L) Isa::store(out + i, Isa::load(in + i));
    for (; i < M * K; ++i) out[i] = to_float(in[i]);
  });
}

// sums[r][m] = x[m, :] . W[n + r, :], r < TILE_N. TILE_N > 1 needs rows of whole blocks.
template <int M, int TILE_N>
void dot_int8(const GemmArgs& args, int64_t n, float (*sums)[kGemvMaxM]) {
  const Weight& w = args.weight;
  const float* x = static_cast<const float*>(args.panel);
  const int64_t K = w.K, row = n * K, block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int64_t slice = 0; slice < K; slice += kGemvSliceK) {
    const int64_t slice_end = K - slice < kGemvSliceK ? K : slice + kGemvSliceK;
    Isa::F total[TILE_N][M];
    float rest[TILE_N][M] = {};                             // of what is no whole register
    float scales[TILE_N][kGemvSliceK / kMinBlockSize + 1];  // a slice may begin inside a block
    for (int r = 0; r < TILE_N; ++r) {
      const int64_t first = (row + r * K + slice) >> w.block_shift;
      scales_of_blocks(w, first, ((row + r * K + slice_end - 1) >> w.block_shift) - first + 1, scales[r]);
      for (int m = 0; m < M; ++m) total[r][m] = Isa::zero();
    }
    const int64_t first_block = (row + slice) >> w.block_shift;
    for (int64_t k = slice; k < slice_end;) {
      const int64_t left = block_mask + 1 - ((row + k) & block_mask), end = slice_end - k < left ? slice_end : k + left;
      const int64_t block = ((row + k) >> w.block_shift) - first_block;
      for (int r = 0; r < TILE_N; ++r) __builtin_prefetch(w.packed + row + (r + TILE_N) * K + k);
      Isa::F partial[TILE_N][M];
      for (int r = 0; r < TILE_N; ++r)
        for (int m = 0; m < M; ++m) partial[r][m] = Isa::zero();
      for (; k + Isa::L <= end; k += Isa::L) {
        Isa::F weights[TILE_N];
        for (int r = 0; r < TILE_N; ++r) weights[r] = Isa::load_int8(w.packed + row + r * K + k);
        for (int m = 0; m < M; ++m) {
          const Isa::F xk = Isa::load(x + m * K + k);
          for (int r = 0; r < TILE_N; ++r) partial[r][m] = Isa::fma(weights[r], xk, partial[r][m]);
        }
      }
      for (int r = 0; r < TILE_N; ++r) {
        const Isa::F scale = Isa::set1(scales[r][block]);
        for (int m = 0; m < M; ++m) total[r][m] = Isa::fma(partial[r][m], scale, total[r][m]);
      }
      if (k == end) continue;
      for (int r = 0; r < TILE_N; ++r)
        for (int m = 0; m < M; ++m) {
          float sum = 0.f;
          for (int64_t i = k; i < end; ++i) sum += x[m * K + i] * float(int8_t(w.packed[row + r * K + i]));
          rest[r][m] += sum * scales[r][block];
        }
      k = end;
    }
    for (int r = 0; r < TILE_N; ++r)
      for (int m = 0; m < M; ++m)
        sums[r][m] = (slice == 0 ? 0.f : sums[r][m]) + (Isa::reduce_add(total[r][m]) + rest[r][m]);
  }
}

template <int TILE_N>
void dot_int8_of_any_m(const GemmArgs& args, int64_t n, float (*sums)[kGemvMaxM]) {
  switch (args.M) {
    case 1: return dot_int8</*M=*/1, TILE_N>(args, n, sums);
    case 2: return dot_int8</*M=*/2, TILE_N>(args, n, sums);
    case 3: return dot_int8</*M=*/3, TILE_N>(args, n, sums);
    default: return dot_int8</*M=*/4, TILE_N>(args, n, sums);
  }
}

// GemvFn.
void gemv_int8(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const Weight& w = args.weight;
  const bool has_whole_blocks = w.K % (int64_t(1) << w.block_shift) == 0;
  with_type(args.dtype, [&](auto t) {
    for (int64_t n = n_begin; n < n_end;) {
      const int n_count = has_whole_blocks && n + kGemvTileN <= n_end ? kGemvTileN : 1;
      float sums[kGemvTileN][kGemvMaxM] = {};  // K = 0 has no slice
      if (n_count == 1)
        dot_int8_of_any_m</*TILE_N=*/1>(args, n, sums);
      else
        dot_int8_of_any_m<kGemvTileN>(args, n, sums);
      for (int r = 0; r < n_count; ++r, ++n) store_column<decltype(t)>(args, n, sums[r]);
    }
  });
}

}  // namespace
}  // namespace nf4::cpu
