// lora_term: out[M, columns] = bias + scaling * inner[M, rank] @ factor, rounded once, with factor[rank, columns], or
// factor[columns, rank] transposed. dequantize + GEMM begins a slice of out with it: the GEMM then adds the slice's
// product in fp32 (beta = 1) and rounds again.
// Read first: transposed_fragments.cuh (how a lane holds the columns of factor), product.cuh (load_ranks).
//
// Who: a block owns 64 rows by 128 columns, each of its 8 warps 16 rows by 64 columns.
// Trick: out is written once, by 16 bytes a lane and whole lines a warp, and read by the GEMM while it computes. The
//   scaling is never rounded to T. Rejected: [x | P] @ [W | s B], which copies all of x, 4 bytes a row and column; adding
//   the term to the product afterwards, which reads out and writes it again.
// Bytes: 2 M columns: 2048 x 4096 take 3.9 us on an H200 (4.3 TB/s), where dequantizing and multiplying with
//   4096 x 4096 take 97 us.
// Needs: bf16 or fp16, columns and strides multiples of 8, pointers aligned to 16 bytes; else an element a thread.
#include "product.cuh"
#include "transposed_fragments.cuh"

namespace nf4::cuda {
namespace {

constexpr int kWarpsAcross = 2, kWarpsDown = 4, kThreads = kWarpsAcross * kWarpsDown * kWarp;
constexpr int kTilesM = 2;  // mma tiles of 8 rows a warp
constexpr int kWarpColumns = 16 * kColumnTiles;
constexpr int kTileM = kWarpsDown * 8 * kTilesM, kTileColumns = kWarpsAcross * kWarpColumns;

template <class T, bool kTransposed, bool kFours>
__global__ void __launch_bounds__(kThreads, 2) lora_term_kernel(const LoraTermArgs args) {
  constexpr int kEach = kLaneRanks<kFours>;
  const Lane lane;
  const int warp = int(threadIdx.x) / kWarp, rank = int(args.rank);
  const int64_t column = int64_t(blockIdx.y) * kTileColumns + warp % kWarpsAcross * kWarpColumns + 8 * lane.g;
  const int64_t m_begin = int64_t(blockIdx.x) * kTileM + warp / kWarpsAcross * 8 * kTilesM;
  const bool is_inside = column < args.columns;
  const T* inner = static_cast<const T*>(args.inner);
  const T* factor = static_cast<const T*>(args.factor);
  uint4 bias = make_uint4(0, 0, 0, 0);
  if (args.bias != nullptr && is_inside)
    bias = load_cached(reinterpret_cast<const uint4*>(static_cast<const T*>(args.bias) + column));

  TransposedSums<kTilesM> sums = {};
#pragma unroll 1
  for (int r = kEach * lane.t; r - kEach * lane.t < rank; r += 4 * kEach) {
    uint32_t a[kColumnTiles][4];
    if constexpr (kTransposed) {
      uint2 columns[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        columns[i] = load_ranks<kFours>(factor + (is_inside ? column + i : 0) * args.factor_stride, r, rank);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        const uint2 first = columns[2 * tile], second = columns[2 * tile + 1];
        a[tile][0] = first.x;
        a[tile][1] = second.x;
        a[tile][2] = first.y;
        a[tile][3] = second.y;
      }
    } else {
      load_transposed(a, factor + r * args.factor_stride + column, r, min(rank, r + kEach), args.factor_stride,
                      is_inside);
    }
    uint2 b[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      b[m] = load_ranks<kFours>(inner + smaller(m_begin + 8 * m + lane.g, args.M - 1) * rank, r, rank);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) mma_16x8x16<T>(sums[tile][m], a[tile], b[m].x, b[m].y);
  }

  const uint32_t biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t row = m_begin + 8 * m + 2 * lane.t + odd;
      if (row >= args.M || !is_inside) continue;
      float values[8];
      eight_columns<kTilesM>(values, sums, m, odd);
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[i] = pack<T>(fmaf(args.scaling, values[2 * i], first_of<T>(biases[i])),
                            fmaf(args.scaling, values[2 * i + 1], second_of<T>(biases[i])));
      *reinterpret_cast<uint4*>(static_cast<T*>(args.out) + row * args.stride + column) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) lora_term_any_kernel(const LoraTermArgs args) {
  const int64_t count = args.M * args.columns;
  const T *inner = static_cast<const T*>(args.inner), *factor = static_cast<const T*>(args.factor);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / args.columns, column = i % args.columns;
    float sum = 0;
    for (int64_t r = 0; r < args.rank; ++r) {
      const T element = factor[args.transposed ? column * args.factor_stride + r : r * args.factor_stride + column];
      sum = fmaf(to_float(inner[row * args.rank + r]), to_float(element), sum);
    }
    const float bias = args.bias == nullptr ? 0.f : to_float(static_cast<const T*>(args.bias)[column]);
    static_cast<T*>(args.out)[row * args.stride + column] = from_float<T>(fmaf(args.scaling, sum, bias));
  }
}

template <class T, bool kTransposed>
cudaError_t launch_for(const LoraTermArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.M, kTileM)), unsigned(ceil_div(args.columns, kTileColumns)));
  const auto has_fours_of = [&](const void* rows, int64_t stride) {
    return stride % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 8 == 0;
  };
  const bool fours = has_fours_of(args.inner, args.rank) && (!kTransposed || has_fours_of(args.factor, args.rank));
  const auto kernel = fours ? lora_term_kernel<T, kTransposed, true> : lora_term_kernel<T, kTransposed, false>;
  return launch(kernel, grid, kThreads, 0, stream, args);
}

template <class T>
cudaError_t launch_for(const LoraTermArgs& args, cudaStream_t stream) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool factor_fits = args.transposed || (args.factor_stride % 8 == 0 && is_aligned(args.factor));
  if (args.columns % 8 != 0 || args.stride % 8 != 0 || !is_aligned(args.out) || !is_aligned(args.bias) || !factor_fits)
    return launch(lora_term_any_kernel<T>, blocks_for(args.M * args.columns, kThreads), kThreads, 0, stream, args);
  return args.transposed ? launch_for<T, true>(args, stream) : launch_for<T, false>(args, stream);
}

}  // namespace

cudaError_t lora_term(const LoraTermArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
