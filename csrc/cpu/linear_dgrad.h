// linear_dgrad: dx[m, k] = sum_n dy[m, n] * W[n, k]
//
// Work split   column tiles of 2L consecutive k; see gemm.h. The caller splits them over threads.
// Inner loop   2L codes of one row of W are one load and two lookups: L even k, then L odd k. The tile keeps that column
//              order through the product and undoes it in the store, which writes pairs.
// The trick    4 column tiles are decoded together, since their 4L bytes of a row share a cache line.
// Flops        2*M*N*K; decoding takes as long as the bf16 products of 16 rows (one core of a Zen 4 EPYC).
// Needs        the vector path needs K % 2L == 0; other K decode whole spans first.
#pragma once

#include "decode_span.h"
#include "gemm.h"

namespace nf4 {
namespace {

constexpr int kDgradGroup = 4;  // column tiles that are decoded together

struct EvenThenOdd {  // the columns of a tile
  static constexpr int first_column(int vector) { return vector; }
};

// 2L weights of row n from column k, even k's and odd k's apart; `cols` of them exist.
static inline void decode_even_odd(const Weight& w, const Isa::Table& table, int64_t n, int64_t k, int64_t cols,
                                   Isa::F& even, Isa::F& odd) {
  const int64_t flat = n * w.K + k;
  if (w.K % (2 * Isa::L) == 0) {
    const Isa::F scale = Isa::set1(block_scale(w, flat >> w.block_shift));
    Isa::decode_pairs(w.packed + flat / 2, table, even, odd);
    even = Isa::mul(even, scale);
    odd = Isa::mul(odd, scale);
    return;
  }
  float decoded[kTileCols] = {}, halves[kTileCols];
  decode_span(w, flat, cols, decoded);
  for (int i = 0; i < kTileCols; ++i) halves[i / 2 + i % 2 * Isa::L] = decoded[i];
  even = Isa::load(halves);
  odd = Isa::load(halves + Isa::L);
}

// Rows are K/2 bytes apart, further than the hardware looks ahead: 2.9 to 2.65 ms at M = 1 (4096x4096, one Zen 4 core).
static inline void prefetch_row(const Weight& w, int64_t n, int64_t k) {
  constexpr int64_t kAhead = 24;
  __builtin_prefetch(w.packed + ((n + kAhead) * w.K + k) / 2);
}

struct DgradFp32 : Fp32Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kDgradGroup;
  static void decode_depth(const Weight& w, int64_t k, int64_t cols, int64_t n, int64_t count, float* slice) {
    const Isa::Table table = Isa::load_table(w.code);
    for (int64_t i = 0; i < count; ++i) {
      prefetch_row(w, n + i, k);
      Isa::F even, odd;
      decode_even_odd(w, table, n + i, k, cols, even, odd);
      Isa::store(slice + i * kTileCols, even);
      Isa::store(slice + i * kTileCols + Isa::L, odd);
    }
  }
};

template <class Core>
void linear_dgrad_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto decode = [&](int64_t k, int64_t cols, int64_t n, int64_t count, typename Core::Slice* slices) {
      for (int64_t c = 0; c < cols; c += kTileCols)
        Core::decode_depth(w, k + c, cols - c < kTileCols ? cols - c : kTileCols, n, count, *slices++);
    };
    const auto store = [&](int64_t m, int64_t k, int64_t cols, const float* row) {
      T* dx = static_cast<T*>(args.out) + m * w.K + k;
      const Isa::F even = Isa::load(row), odd = Isa::load(row + Isa::L);
      if (cols == kTileCols) return Isa::store_pairs(dx, even, odd);
      T whole[kTileCols];
      Isa::store_pairs(whole, even, odd);
      std::memcpy(static_cast<void*>(dx), whole, size_t(cols) * sizeof(T));
    };
    gemm<Core>(args, w.N, w.K, tile_begin, tile_end, workspace, decode, store);
  });
}

}  // namespace
}  // namespace nf4
