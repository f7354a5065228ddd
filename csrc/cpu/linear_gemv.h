// linear, M <= 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Work split   Columns [n_begin, n_end) of y, two rows of W at a time. The caller splits them over threads.
// Inner loop   2L codes are one load, two lookups and two FMAs a row of x; the block's scale is applied once per block,
//              to the fp32 partial sum.
// Prefetch     The next rows of W, one line a block: 1.5 to 0.87 ms out of cache (4096x4096, one core of a Zen 4 EPYC).
// Instead      Where the machine has vdpbf16ps, linear_gemv_codes.h takes half the instructions.
// Bytes        Reads 0.52 B a weight (double-quantized): the floor is that over the memory or L3 bandwidth.
// Needs        K % 2L == 0 for the vector path; other K decode whole spans first. |x| summed over a block stays in
//              fp32's range: the scale comes after that sum.
//
//   panel, fp32, in the order that the lookups yield: [K / 2L][M][2L]
//
//     | m = 0: k 0 2 4 ..| k 1 3 5 ..| m = 1: k 0 2 4 ..| k 1 3 5 ..| ... | m = 0: k 2L 2L+2 .. |
//        L lanes: even      L lanes: odd
#pragma once

#include "decode_span.h"
#include "lora_term.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kGemvSliceK = 512 * kMinBlockSize;  // at most 512 block sums are added up in one accumulator
constexpr int kGemvTileN = 2;                         // rows of W per load of x

static inline bool has_whole_pairs(int64_t K) { return K % (2 * Isa::L) == 0; }

int64_t gemv_row_bytes(int64_t K) { return K * int64_t(sizeof(float)); }

void gemv_pack(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel) {
  float* out = static_cast<float*>(panel);
  const bool has_pairs = has_whole_pairs(K);
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t group = k / (2 * Isa::L), lane = k % (2 * Isa::L);
        const int64_t at = has_pairs ? (group * M + m) * 2 * Isa::L + lane / 2 + lane % 2 * Isa::L : m * K + k;
        out[at] = to_float(in[m * K + k]);
      }
  });
}

// sums[r][m] = x[m, :] . W[n + r, :], r < TILE_N. Rows of W start on whole groups of 2L codes; TILE_N > 1 needs rows of
// whole blocks.
template <int M, int TILE_N>
void dot_pairs(const GemmArgs& args, const Isa::Table& table, int64_t n, float (*sums)[kGemvMaxM]) {
  const Weight& w = args.weight;
  const float* x = static_cast<const float*>(args.panel);
  const int64_t row = n * w.K, block_size = int64_t(1) << w.block_shift;
  const int64_t block_mask = (block_size < 2 * Isa::L ? 2 * Isa::L : block_size) - 1;  // two short ones as one
  for (int64_t slice = 0; slice < w.K; slice += kGemvSliceK) {
    const int64_t slice_end = w.K - slice < kGemvSliceK ? w.K : slice + kGemvSliceK;
    Isa::F total[TILE_N][M];
    float scales[TILE_N][kGemvSliceK / kMinBlockSize + 1];  // a slice may begin inside a block
    for (int r = 0; r < TILE_N; ++r) {
      const int64_t first = (row + r * w.K + slice) >> w.block_shift;
      scales_of_blocks(w, first, ((row + r * w.K + slice_end - 1) >> w.block_shift) - first + 1, scales[r]);
      for (int m = 0; m < M; ++m) total[r][m] = Isa::zero();
    }
    const int64_t first_block = (row + slice) >> w.block_shift;
    for (int64_t k = slice; k < slice_end;) {
      const int64_t begin = k, left = block_mask + 1 - ((row + k) & block_mask);
      const int64_t end = slice_end - k < left ? slice_end : k + left;
      for (int r = 0; r < TILE_N; ++r) __builtin_prefetch(w.packed + (row + (r + TILE_N) * w.K + k) / 2);
      Isa::F partial[TILE_N][M];
      for (int r = 0; r < TILE_N; ++r)
        for (int m = 0; m < M; ++m) partial[r][m] = Isa::zero();
      for (; k < end; k += 2 * Isa::L) {
        Isa::F even[TILE_N], odd[TILE_N];
        for (int r = 0; r < TILE_N; ++r) Isa::decode_pairs(w.packed + (row + r * w.K + k) / 2, table, even[r], odd[r]);
        const float* xk = x + k * M;
        for (int m = 0; m < M; ++m) {
          const Isa::F x_even = Isa::load(xk + m * 2 * Isa::L), x_odd = Isa::load(xk + m * 2 * Isa::L + Isa::L);
          for (int r = 0; r < TILE_N; ++r) {
            partial[r][m] = Isa::fma(even[r], x_even, partial[r][m]);
            partial[r][m] = Isa::fma(odd[r], x_odd, partial[r][m]);
          }
        }
      }
      for (int r = 0; r < TILE_N; ++r) {
        const float* own = scales[r] + (((row + begin) >> w.block_shift) - first_block);
        const Isa::F scale = block_size < 2 * Isa::L ? Isa::set_halves(own[0], own[1]) : Isa::set1(own[0]);
        for (int m = 0; m < M; ++m) total[r][m] = Isa::fma(partial[r][m], scale, total[r][m]);
      }
    }
    for (int r = 0; r < TILE_N; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = (slice == 0 ? 0.f : sums[r][m]) + Isa::reduce_add(total[r][m]);
  }
}

template <int TILE_N>
void dot_pairs_of_any_m(const GemmArgs& args, const Isa::Table& table, int64_t n, float (*sums)[kGemvMaxM]) {
  switch (args.M) {
    case 1: return dot_pairs</*M=*/1, TILE_N>(args, table, n, sums);
    case 2: return dot_pairs</*M=*/2, TILE_N>(args, table, n, sums);
    case 3: return dot_pairs</*M=*/3, TILE_N>(args, table, n, sums);
    default: return dot_pairs</*M=*/4, TILE_N>(args, table, n, sums);
  }
}

// The same for any K: spans of decoded weights against x in natural order.
void dot_spans(const GemmArgs& args, int64_t n, float* sums) {
  constexpr int64_t kSpan = 512;
  const int64_t K = args.weight.K;
  float decoded[kSpan];
  for (int64_t m = 0; m < args.M; ++m) sums[m] = 0.f;
  for (int64_t k = 0; k < K; k += kSpan) {
    const int64_t count = K - k < kSpan ? K - k : kSpan;
    decode_span(args.weight, n * K + k, count, decoded);
    for (int64_t m = 0; m < args.M; ++m) {
      const float* x = static_cast<const float*>(args.panel) + m * K + k;
      Isa::F total = Isa::zero();
      int64_t i = 0;
      for (; i + Isa::L <= count; i += Isa::L) total = Isa::fma(Isa::load(x + i), Isa::load(decoded + i), total);
      float sum = Isa::reduce_add(total);
      for (; i < count; ++i) sum += x[i] * decoded[i];
      sums[m] += sum;
    }
  }
}

// GemvFn.
void linear_gemv(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const Weight& w = args.weight;
  const Isa::Table table = Isa::load_table(w.code);
  const bool has_pairs = has_whole_pairs(w.K) && w.K > 0;
  const bool has_whole_blocks = w.K % (int64_t(1) << w.block_shift) == 0;
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = n_begin; n < n_end;) {
      const int n_count = has_pairs && has_whole_blocks && n + kGemvTileN <= n_end ? kGemvTileN : 1;
      float sums[kGemvTileN][kGemvMaxM];
      if (!has_pairs)
        dot_spans(args, n, sums[0]);
      else if (n_count == 1)
        dot_pairs_of_any_m</*TILE_N=*/1>(args, table, n, sums);
      else
        dot_pairs_of_any_m<kGemvTileN>(args, table, n, sums);
      for (int r = 0; r < n_count; ++r, ++n) store_column<T>(args, n, sums[r]);
    }
  });
}

}  // namespace
}  // namespace nf4::cpu
