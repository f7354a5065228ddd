// lora_grad: out[rank, columns] = scaling * small[M, rank]^T @ wide[M, columns], the gradients dA and dB of LoRA.
// Read first: transposed_fragments.cuh (how a lane holds wide).
//
// Who: a block owns 8 kRankTiles ranks by 64 columns and one of `splits` parts of M. Its 8 warps take turns at 16 m;
//   their sums, and then those of the splits, are added in order.
// Trick: wide, the only large operand, is read once (16 bytes a lane, four rows of 128 bytes a warp) and goes straight
//   to tensor cores: at rank 16 an H200 at memory speed would need 69 TFLOP/s, more than its fp32 FMAs have. small is
//   read by single elements; it stays in the L1.
// Bytes: 2 M * columns; 2048 x 4096: 3.9 us on an H200 (4.3 TB/s).
// Needs: bf16 or fp16, columns % 8 == 0, all pointers aligned to 16 bytes.
#include "product.cuh"
#include "transposed_fragments.cuh"

namespace nf4::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 64;
constexpr int kStep = 16;  // m of one mma

template <class T, int kRankTiles>
__global__ void __launch_bounds__(kWarps* kWarp) lora_grad_kernel(const LoraGradArgs args) {
  const Lane lane;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kColumns + 8 * lane.g, r_begin = int64_t(blockIdx.z) * 8 * kRankTiles;
  const T* small = static_cast<const T*>(args.small);
  const T* wide = static_cast<const T*>(args.wide) + column;
  const SplitRange steps(ceil_div(args.M, kStep), blockIdx.y, args.splits);

  TransposedSums<kRankTiles> sums = {};
  for (int64_t step = steps.begin + warp; step < steps.end; step += kWarps) {
    const int64_t m = step * kStep + 4 * lane.t;
    uint32_t a[kColumnTiles][4];
    load_transposed(a, wide + m * args.columns, m, args.M, args.columns, column < args.columns);
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      const int64_t r = r_begin + 8 * tile + lane.g;
      uint32_t ranks[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ranks[i] = m + i < args.M && r < args.rank ? small[(m + i) * args.rank + r].bits : 0u;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i)
        mma_16x8x16<T>(sums[i][tile], a[i], ranks[0] | ranks[1] << 16, ranks[2] | ranks[3] << 16);
    }
  }

  constexpr int kTileFloats = 8 * kRankTiles * kColumns;
  float* scratch = shared_memory<float>();  // [kWarps, 8 kRankTiles, kColumns]
#pragma unroll
  for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float values[8];
      eight_columns<kRankTiles>(values, sums, tile, odd);
      float* to = scratch + warp * kTileFloats + (8 * tile + 2 * lane.t + odd) * kColumns + 8 * lane.g;
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = values[i];
    }
  sync_block();
  for (int i = int(threadIdx.x); i < kTileFloats; i += kWarps * kWarp) {
    const int64_t r = r_begin + i / kColumns, to = int64_t(blockIdx.x) * kColumns + i % kColumns;
    if (r >= args.rank || to >= args.columns) continue;
    float total = 0;
    for (int from = 0; from < kWarps; ++from) total += scratch[from * kTileFloats + i];
    args.partial[(blockIdx.y * args.rank + r) * args.columns + to] = total;
  }
}

template <class T, int kRankTiles>
cudaError_t launch_for(const LoraGradArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.columns, kColumns)), unsigned(args.splits),
                  unsigned(ceil_div(args.rank, 8 * kRankTiles)));
  const size_t shared_bytes = size_t(kWarps) * 8 * kRankTiles * kColumns * 4;
  return launch(lora_grad_kernel<T, kRankTiles>, grid, kWarps * kWarp, shared_bytes, stream, args);
}

template <class T>
cudaError_t launch_for(const LoraGradArgs& args, cudaStream_t stream) {
  return args.rank <= 16 ? launch_for<T, 2>(args, stream) : launch_for<T, 4>(args, stream);
}

}  // namespace

cudaError_t lora_grad(const LoraGradArgs& args, cudaStream_t stream) {
  const cudaError_t error =
      args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
  if (error != cudaSuccess) return error;
  return reduce_splits({args.partial, args.splits, args.rank, args.columns, args.scaling, nullptr, args.out_dtype,
                        args.out, args.transposed},
                       stream);
}

}  // namespace nf4::cuda
