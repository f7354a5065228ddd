// linear, M > 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Work split   column tiles of 2L rows of W; see gemm.h. The caller splits them over threads.
// Inner loop   32 codes of L rows of W are transposed as bytes, 16 at a time, so that each lookup yields L output
//              columns of one k. (Transposing decoded fp32 would move 8 times the bytes.)
// Prefetch     each row's next slice: the rows lie K/2 bytes apart, further than the hardware looks ahead (5.0 to 4.2 ms
//              at M = 16 out of cache; 4096x4096, one core of a Zen 4 EPYC).
// Flops        2*M*N*K; decoding takes as long as the bf16 products of 11 rows (the same machine).
// Needs        the vector path needs K % 32 == 0; other K decode whole spans first.
#pragma once

#include "decode_span.h"
#include "gemm.h"

namespace nf4 {
namespace {

// The scales of L rows of W at column k.
static inline Isa::F row_scales(const Weight& w, int64_t n, int64_t rows, int64_t k) {
  float scales[Isa::L];
  for (int64_t r = 0; r < Isa::L; ++r) {
    const int64_t row = n + (r < rows ? r : rows - 1);
    scales[r] = block_scale(w, (row * w.K + k) >> w.block_shift);
  }
  return Isa::load(scales);
}

// Codes 2i and 2i+1 of each lane's u32, decoded and scaled: two consecutive k of L rows.
template <int PAIR>
static inline void decode_column_pair(const Isa::Table& table, Isa::I codes, Isa::F scale, Isa::F& even, Isa::F& odd) {
  even = Isa::mul(Isa::lookup(table, Isa::template shift_right<8 * PAIR + 4>(codes)), scale);
  odd = Isa::mul(Isa::lookup(table, Isa::template shift_right<8 * PAIR>(codes)), scale);
}

// fp32 slices are [k][tile_cols]. store_column_pair writes k and k+1 of the L columns from `out` on.
struct LinearFp32 : Fp32Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1;
  static void store_column_pair(float* out, Isa::F even, Isa::F odd) {
    Isa::store(out, even);
    Isa::store(out + kTileCols, odd);
  }
};

// W[n .. n + kTileCols, k .. k + count), transposed, into a slice; rows past `rows` repeat the last one.
template <class Core>
void decode_rows(const Weight& w, int64_t n, int64_t rows, int64_t k, int64_t count, typename Core::Element* slice) {
  const Isa::Table table = Isa::load_table(w.code);
  const bool scale_every_32 = w.K % (int64_t(1) << w.block_shift) != 0;
  const int64_t block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = n + v * Isa::L < n + rows ? n + v * Isa::L : n + rows - 1;
    const int64_t here = n + rows - first < Isa::L ? n + rows - first : Isa::L;
    const uint8_t* sources[Isa::L];
    for (int64_t r = 0; r < Isa::L; ++r) {
      sources[r] = w.packed + (first + (r < here ? r : here - 1)) * (w.K / 2);
      for (int64_t line = 0; line < count / 2; line += 64) __builtin_prefetch(sources[r] + (k + count) / 2 + line);
    }
    Isa::F scale = row_scales(w, first, here, k);
    for (int64_t i = 0; i < count; i += 32) {
      if (i > 0 && (scale_every_32 || ((k + i) & block_mask) == 0)) scale = row_scales(w, first, here, k + i);
      Isa::I columns[4];
      Isa::load_columns(sources, (k + i) / 2, columns);
      typename Core::Element* out = slice + i * kTileCols + v * Isa::L * Core::kStep;
      for (int j = 0; j < 4; ++j, out += 8 * kTileCols) {
        Isa::F even, odd;
        decode_column_pair<0>(table, columns[j], scale, even, odd);
        Core::store_column_pair(out, even, odd);
        decode_column_pair<1>(table, columns[j], scale, even, odd);
        Core::store_column_pair(out + 2 * kTileCols, even, odd);
        decode_column_pair<2>(table, columns[j], scale, even, odd);
        Core::store_column_pair(out + 4 * kTileCols, even, odd);
        decode_column_pair<3>(table, columns[j], scale, even, odd);
        Core::store_column_pair(out + 6 * kTileCols, even, odd);
      }
    }
  }
}

// The same for any K: each row is decoded as a span, then spread.
template <class Core>
void decode_row_spans(const Weight& w, int64_t n, int64_t rows, int64_t k, int64_t count,
                      typename Core::Element* slice) {
  typename Core::Element decoded[kGemmDepth];
  const int64_t inside = w.K - k < count ? w.K - k : count;
  std::memset(static_cast<void*>(decoded), 0, sizeof decoded);
  for (int64_t c = 0; c < kTileCols; ++c) {
    if (c < rows) decode_span(w, (n + c) * w.K + k, inside, decoded);
    typename Core::Element* out = slice + c * Core::kStep;
    for (int64_t i = 0; i < count; i += Core::kStep, out += kTileCols * Core::kStep)
      std::memcpy(static_cast<void*>(out), decoded + i, Core::kStep * sizeof *out);
  }
}

// One finished fp32 row of y's columns n..n+cols, with bias.
static inline void store_row(const GemmArgs& args, int64_t m, int64_t n, int64_t cols, const float* row) {
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.out) + m * args.weight.N + n;
    int64_t c = 0;
    for (; c + Isa::L <= cols; c += Isa::L) {
      const Isa::F sum = Isa::load(row + c);
      Isa::store(y + c, bias == nullptr ? sum : Isa::add(sum, Isa::load(bias + n + c)));
    }
    for (; c < cols; ++c) y[c] = from_float<T>(row[c] + (bias == nullptr ? 0.f : to_float(bias[n + c])));
  });
}

template <class Core>
void linear_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const auto decode = [&](int64_t n, int64_t rows, int64_t k, int64_t count, typename Core::Slice* slice) {
    if (w.K % 32 == 0)
      decode_rows<Core>(w, n, rows, k, count, *slice);
    else
      decode_row_spans<Core>(w, n, rows, k, count, *slice);
  };
  const auto store = [&](int64_t m, int64_t n, int64_t cols, const float* row) { store_row(args, m, n, cols, row); };
  gemm<Core>(args, w.K, w.N, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace
}  // namespace nf4
