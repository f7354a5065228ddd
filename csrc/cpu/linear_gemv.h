// linear, M <= 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Work split   output columns [n_begin, n_end); the caller splits them over threads.
// Inner loop   2L codes are one load, two lookups and two FMAs a row of x; the block's scale is applied once per block, to
//              the fp32 partial sum. x waits in fp32 as [K/2L][M][L even | L odd], the order the lookups yield.
// Rejected     bf16 codes and vdpbf16ps: half the instructions, but a table rounded to bf16 is biased, which shows when x
//              has a mean (2.06 % against 0.26 % of the output at a mean of one sigma).
// Bytes        reads 0.52 B a weight (double-quantized): the floor is that over the memory or L3 bandwidth.
// Needs        the vector path needs K % 2L == 0; other K decode whole spans first.
#pragma once

#include "decode_span.h"

namespace nf4 {
namespace {

// At most 512 block sums are added up in one accumulator.
constexpr int64_t kGemvSlice = 512 * kMinBlockSize;

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

// sums[m] = x[m, :] . W[n, :] where rows of W start on whole groups of 2L codes.
template <int M>
void gemv_row_pairs(const GemmArgs& args, const Isa::Table& table, int64_t n, float* sums) {
  const Weight& w = args.weight;
  const float* x = static_cast<const float*>(args.panel);
  const int64_t row = n * w.K, block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int m = 0; m < M; ++m) sums[m] = 0.f;
  for (int64_t slice = 0; slice < w.K; slice += kGemvSlice) {
    const int64_t slice_end = w.K - slice < kGemvSlice ? w.K : slice + kGemvSlice;
    Isa::F total[M];
    for (int m = 0; m < M; ++m) total[m] = Isa::zero();
    for (int64_t k = slice; k < slice_end;) {
      const int64_t left = block_mask + 1 - ((row + k) & block_mask);
      const int64_t end = slice_end - k < left ? slice_end : k + left;
      const Isa::F scale = Isa::set1(block_scale(w, (row + k) >> w.block_shift));
      Isa::F partial[M];
      for (int m = 0; m < M; ++m) partial[m] = Isa::zero();
      for (; k < end; k += 2 * Isa::L) {
        Isa::F even, odd;
        Isa::decode_pairs(w.packed + (row + k) / 2, table, even, odd);
        const float* xk = x + k * M;
        for (int m = 0; m < M; ++m) {
          partial[m] = Isa::fma(even, Isa::load(xk + m * 2 * Isa::L), partial[m]);
          partial[m] = Isa::fma(odd, Isa::load(xk + m * 2 * Isa::L + Isa::L), partial[m]);
        }
      }
      for (int m = 0; m < M; ++m) total[m] = Isa::fma(partial[m], scale, total[m]);
    }
    for (int m = 0; m < M; ++m) sums[m] += Isa::reduce_add(total[m]);
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
  const bool pairs = gemv_in_pairs(w.K);
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.out);
    for (int64_t n = n_begin; n < n_end; ++n) {
      float sums[kGemvRows];
      if (!pairs) {
        gemv_row_spans(args, n, sums);
      } else {
        switch (args.rows) {
          case 1: gemv_row_pairs<1>(args, table, n, sums); break;
          case 2: gemv_row_pairs<2>(args, table, n, sums); break;
          case 3: gemv_row_pairs<3>(args, table, n, sums); break;
          default: gemv_row_pairs<4>(args, table, n, sums);
        }
      }
      for (int64_t m = 0; m < args.rows; ++m)
        y[m * w.N + n] = from_float<T>(sums[m] + (bias == nullptr ? 0.f : to_float(bias[n])));
    }
  });
}

}  // namespace
}  // namespace nf4
