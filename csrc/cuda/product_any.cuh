// linear, linear_dgrad and lora_grad for any shape, block size, dtype and alignment: true fp32, no tensor cores.
//
//   out[M, columns] = scaling * P[M, rank] @ F[rank, columns] + X[M, depth] @ Y[depth, columns] (+ bias)
//
// The rows of out are M (of lora_grad: the rank). Its columns and the depth, the length of the contraction, are N and K
// in linear, K and N in linear_dgrad.
//
// Who: a block of 256 threads owns 64 x 64 of out, a thread 4 x 4 of it. Steps of 16 along the depth pass through
//   shared memory as fp32; Ŵ is decoded weight by weight on its way there.
// Trick: none; this path takes fp32 activations and the shapes that the others refuse. Each 64 terms are summed apart:
//   a running sum over 512 terms of one sign loses twice what dense fp32 does.
// Time: 2 M N K flops on fp32 units at about a third of their rate (one load of 4 values a side for 16 multiply-adds);
//   decoding, 20 instructions a weight for each 64 rows of x, comes on top: as long again for few rows.
#pragma once

#include "product.cuh"

namespace nf4::cuda::any {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // resident at once, at least; without it ptxas spills to have room for a fourth
constexpr int kTile = 64;
constexpr int kDepth = 16;  // of a step
constexpr int kOwn = 4;     // rows and columns of a thread
constexpr int kLongestSum = 64;
constexpr int kPitch = kTile + 4;  // rows stay aligned to 16 bytes
constexpr size_t kSharedBytes = size_t(2) * kDepth * kPitch * 4;

// Element (i, k) of a matrix of T with any strides.
template <class T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;
  NF4_DEVICE float operator()(int64_t i, int64_t k) const { return to_float(data[i * row_stride + k * column_stride]); }
};

// Ŵ in fp32, indexed as the product's right operand: (k, n) for linear (transposed), (n, k) for linear_dgrad.
template <bool kTransposed>
struct Decoded {
  const Weight& w;
  NF4_DEVICE float operator()(int64_t i, int64_t j) const {
    const int64_t at = kTransposed ? j * w.K + i : i * w.K + j;
    const auto block = [&](int) { return at >> w.block_shift; };
    float scale[1];
    decode_scales(scale, w, w.scales, load_scales<1>(w, w.scales, block), offset_of(w), block);
    return w.code[nibble(w.packed, at)] * scale[0];
  }
};

struct Tile {
  int64_t row, column;    // of out, where the tile begins
  int64_t rows, columns;  // where out ends
};

using Sums = float[kOwn][kOwn];

// sums += x[rows, depth] @ y[depth, columns] over this tile. `shared` holds x^T and y, [kDepth, kPitch] each.
template <class X, class Y>
NF4_DEVICE void add_product(Sums& sums, const X& x, const Y& y, int64_t depth, const Tile& tile, float* shared) {
  float* x_tile = shared;
  float* y_tile = shared + kDepth * kPitch;
  const int thread = int(threadIdx.x), own_row = thread / 16 * kOwn, own_column = thread % 16 * kOwn;
  for (int64_t chunk = 0; chunk < depth; chunk += kLongestSum) {
    Sums part = {};
    const int64_t end = smaller(chunk + kLongestSum, depth);
    for (int64_t k = chunk; k < end; k += kDepth) {
      sync_block();  // all have read the tiles
      for (int i = thread; i < kTile * kDepth; i += kThreads) {
        const int64_t at = k + i % kDepth, row = tile.row + i / kDepth, column = tile.column + i % kTile;
        x_tile[i % kDepth * kPitch + i / kDepth] = at < end && row < tile.rows ? x(row, at) : 0.f;
        const int64_t y_at = k + i / kTile;
        y_tile[i / kTile * kPitch + i % kTile] = y_at < end && column < tile.columns ? y(y_at, column) : 0.f;
      }
      sync_block();
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j)
            part[i][j] = fmaf(x_tile[d * kPitch + own_row + i], y_tile[d * kPitch + own_column + j], part[i][j]);
    }
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) sums[i][j] += part[i][j];
  }
}

// Calls store(row, column, sum) for this thread's part of the tile.
template <class F>
NF4_DEVICE void for_each_own(const Sums& sums, const Tile& tile, F&& store) {
  for (int i = 0; i < kOwn; ++i)
    for (int j = 0; j < kOwn; ++j) {
      const int64_t row = tile.row + int(threadIdx.x) / 16 * kOwn + i;
      const int64_t column = tile.column + int(threadIdx.x) % 16 * kOwn + j;
      if (row < tile.rows && column < tile.columns) store(row, column, sums[i][j]);
    }
}

// The work of a thread block in linear or linear_dgrad.
template <class T, bool kDgrad, class Work>
NF4_DEVICE void product_any_block(const ProductArgs& args, const Work& work) {
  const Weight& w = work.weight;
  const int64_t depth = kDgrad ? w.N : w.K, columns = kDgrad ? w.K : w.N;
  const Tile tile{work.m_begin, int64_t(work.tile) * kTile, work.m_end, columns};
  const T* lora_factor = work.template own<T>(args.lora_factor, args.rank * columns);
  Sums sums = {};
  if (args.rank > 0) {
    const Strided<T> inner{static_cast<const T*>(args.lora_inner), args.rank, 1};
    const Strided<T> factor{lora_factor, kDgrad ? columns : 1, kDgrad ? 1 : args.rank};
    add_product(sums, inner, factor, args.rank, tile, shared_memory<float>());
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) sums[i][j] *= args.scaling;
  }
  add_product(sums, Strided<T>{static_cast<const T*>(args.x), depth, 1}, Decoded<!kDgrad>{w}, depth, tile,
              shared_memory<float>());
  const Store<T> store(args, columns, work);
  for_each_own(sums, tile, [&](int64_t row, int64_t column, float sum) { store.one(row, column, sum); });
}

}  // namespace nf4::cuda::any
