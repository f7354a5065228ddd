// lora_grad: out[rank, columns] = scaling * small[M, rank]^T @ wide[M, columns], the gradients dA and dB of LoRA.
// Read first: lora_grad.cuh (a block's sums).
//
// Who: a block owns 8 kRankTiles ranks by 64 columns and one of `splits` parts of M. The last of a tile's blocks to
//   arrive (arrivals.cuh) adds the splits' sums in order; without counters reduce_splits does, in a second launch.
// Bytes: 2 M * columns; 2048 x 4096: 3.9 us on an H200 (4.3 TB/s).
// Needs: as lora_grad.cuh.
#include "arrivals.cuh"
#include "lora_grad.cuh"

namespace nf4::cuda {
namespace {

using namespace lora_grad_block;

template <class T, int kRankTiles>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<kRankTiles>) lora_grad_kernel(const LoraGradArgs args) {
  const SplitRange steps(ceil_div(args.M, kStep), blockIdx.y, args.splits);
  Grad<T, kRankTiles> grad(args, int64_t(blockIdx.x) * kColumns, int64_t(blockIdx.z) * 8 * kRankTiles);
  grad.sum(steps.begin * kStep, smaller(steps.end * kStep, args.M));
  grad.keep(true);
  if (args.splits == 1) {
    grad.finish([&](int64_t r, int64_t column, float total) { store_grad(args, 0, r, column, total); });
    return;
  }
  const int64_t count = args.rank * args.columns;
  grad.finish([&](int64_t r, int64_t column, float total) {
    args.partial[blockIdx.y * count + r * args.columns + column] = total;
  });
  const int tile = int(blockIdx.z * gridDim.x + blockIdx.x);
  if (args.arrivals < 0 || !is_last_to_arrive(args.arrivals, tile, args.splits, shared_memory<uint32_t>())) return;
  grad.for_each_own([&](int64_t r, int64_t column, int) {
    const float* from = args.partial + r * args.columns + column;
    float total = 0;
#pragma unroll 4
    for (int split = 0; split < args.splits; ++split) total += load_l2(from + split * count);
    store_grad(args, 0, r, column, total);
  });
}

template <class T, int kRankTiles>
cudaError_t launch_for(const LoraGradArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.columns, kColumns)), unsigned(args.splits),
                  unsigned(ceil_div(args.rank, 8 * kRankTiles)));
  return launch(lora_grad_kernel<T, kRankTiles>, grid, kWarps * kWarp, kSharedBytes<kRankTiles>, stream, args);
}

template <class T>
cudaError_t launch_for(const LoraGradArgs& args, cudaStream_t stream) {
  return args.rank <= 16 ? launch_for<T, 2>(args, stream) : launch_for<T, 4>(args, stream);
}

}  // namespace

cudaError_t lora_grad(const LoraGradArgs& args, cudaStream_t stream) {
  LoraGradArgs own = args;
  const int64_t tiles = ceil_div(args.columns, kColumns) * ceil_div(args.rank, args.rank <= 16 ? 16 : 32);
  if (tiles > kArrivals) own.arrivals = -1;
  const cudaError_t error =
      args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(own, stream) : launch_for<Float16>(own, stream);
  if (error != cudaSuccess || args.splits == 1 || own.arrivals >= 0) return error;
  return reduce_splits({args.partial, args.splits, args.rank, args.columns, args.scaling, args.out_dtype, args.out,
                        args.transposed, nullptr},
                       stream);
}

}  // namespace nf4::cuda
