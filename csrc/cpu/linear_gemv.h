// linear, M <= 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Work split   output columns [n_begin, n_end); the caller splits them over threads.
// Inner loop   2L codes are one load, two lookups and two FMAs a row of x; the block's scale is applied once per block,
//              to the fp32 partial sum. x waits in fp32 as [K/2L][M][L even | L odd], the order the lookups yield.
// Prefetch     the next rows, one line a block: 1.5 to 0.87 ms out of cache (4096x4096, one core of a Zen 4 EPYC).
// Instead      bf16 codes and vdpbf16ps, half the instructions, where the machine has them: linear_gemv_codes.h.
// Bytes        reads 0.52 B a weight (double-quantized): the floor is that over the memory or L3 bandwidth.
// Needs        the vector path needs K % 2L == 0; other K decode whole spans first. |x| summed over a block stays in
//              fp32's range: the scale comes after that sum.
#pragma once

#include "decode_span.h"
#include "low_rank.h"

namespace nf4 {
namespace {

// At most 512 block sums are added up in one accumulator.
constexpr int64_t kGemvSlice = 512 * kMinBlockSize;
constexpr int kRowsAtOnce = 2;  // rows of W per load of x

static inline bool gemv_in_pairs(int64_t K) { return K % (2 * Isa::L) == 0; }

void gemv_pack_x(const void* x, Dtype dtype, int64_t rows, int64_t K, void* panel) {
  float* out = static_cast<float*>(panel);
  const bool pairs = gemv_in_pairs(K);
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t group = k / (2 * Isa::L), lane = k % (2 * Isa::L);
        const int64_t at = pairs ? (group * rows + m) * 2 * Isa::L + lane / 2 + lane % 2 * Isa::L : m * K + k;
        out[at] = to_float(in[m * K + k]);
      }
  });
}

// sums[r][m] = x[m, :] . W[n + r, :] where rows of W start on whole groups of 2L codes; ROWS > 1 needs whole blocks a
// row.
template <int M, int ROWS>
void gemv_row_pairs(const GemmArgs& args, const Isa::Table& table, int64_t n, float (*sums)[kGemvRows]) {
  const Weight& w = args.weight;
  const float* x = static_cast<const float*>(args.panel);
  const int64_t row = n * w.K, block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int64_t slice = 0; slice < w.K; slice += kGemvSlice) {
    const int64_t slice_end = w.K - slice < kGemvSlice ? w.K : slice + kGemvSlice;
    Isa::F total[ROWS][M];
    for (int r = 0; r < ROWS; ++r)
      for (int m = 0; m < M; ++m) total[r][m] = Isa::zero();
    for (int64_t k = slice; k < slice_end;) {
      const int64_t begin = k, left = block_mask + 1 - ((row + k) & block_mask);
      const int64_t end = slice_end - k < left ? slice_end : k + left;
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(w.packed + (row + (r + ROWS) * w.K + k) / 2);
      Isa::F partial[ROWS][M];
      for (int r = 0; r < ROWS; ++r)
        for (int m = 0; m < M; ++m) partial[r][m] = Isa::zero();
      for (; k < end; k += 2 * Isa::L) {
        Isa::F even[ROWS], odd[ROWS];
        for (int r = 0; r < ROWS; ++r) Isa::decode_pairs(w.packed + (row + r * w.K + k) / 2, table, even[r], odd[r]);
        const float* xk = x + k * M;
        for (int m = 0; m < M; ++m) {
          const Isa::F x_even = Isa::load(xk + m * 2 * Isa::L), x_odd = Isa::load(xk + m * 2 * Isa::L + Isa::L);
          for (int r = 0; r < ROWS; ++r) {
            partial[r][m] = Isa::fma(even[r], x_even, partial[r][m]);
            partial[r][m] = Isa::fma(odd[r], x_odd, partial[r][m]);
          }
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        const Isa::F scale = Isa::set1(block_scale(w, (row + r * w.K + begin) >> w.block_shift));
        for (int m = 0; m < M; ++m) total[r][m] = Isa::fma(partial[r][m], scale, total[r][m]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = (slice == 0 ? 0.f : sums[r][m]) + Isa::reduce_add(total[r][m]);
  }
}

template <int ROWS>
void gemv_rows_of(const GemmArgs& args, const Isa::Table& table, int64_t n, float (*sums)[kGemvRows]) {
  switch (args.rows) {
    case 1: return gemv_row_pairs<1, ROWS>(args, table, n, sums);
    case 2: return gemv_row_pairs<2, ROWS>(args, table, n, sums);
    case 3: return gemv_row_pairs<3, ROWS>(args, table, n, sums);
    default: return gemv_row_pairs<4, ROWS>(args, table, n, sums);
  }
}

// The same for any K: spans of decoded weights against x in natural order.
void gemv_row_spans(const GemmArgs& args, int64_t n, float* sums) {
  constexpr int64_t kSpan = 512;
  const int64_t K = args.weight.K;
  float decoded[kSpan];
  for (int64_t m = 0; m < args.rows; ++m) sums[m] = 0.f;
  for (int64_t k = 0; k < K; k += kSpan) {
    const int64_t count = K - k < kSpan ? K - k : kSpan;
    decode_span(args.weight, n * K + k, count, decoded);
    for (int64_t m = 0; m < args.rows; ++m) {
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

void gemv_columns(const GemmArgs& args, int64_t n_begin, int64_t n_end) {
  const Weight& w = args.weight;
  const Isa::Table table = Isa::load_table(w.code);
  const bool pairs = gemv_in_pairs(w.K) && w.K > 0, whole_blocks = w.K % (int64_t(1) << w.block_shift) == 0;
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = n_begin; n < n_end;) {
      const int rows = pairs && whole_blocks && n + kRowsAtOnce <= n_end ? kRowsAtOnce : 1;
      float sums[kRowsAtOnce][kGemvRows];
      if (!pairs)
        gemv_row_spans(args, n, sums[0]);
      else if (rows == 1)
        gemv_rows_of<1>(args, table, n, sums);
      else
        gemv_rows_of<kRowsAtOnce>(args, table, n, sums);
      for (int r = 0; r < rows; ++r, ++n) store_column<T>(args, n, sums[r]);
    }
  });
}

}  // namespace
}  // namespace nf4
