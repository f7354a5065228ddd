// linear_dgrad: one block of linear_dgrad_tiled.cuh a tile of 16, 32, 64 or 128 m and a split of N.
#include "linear_dgrad_tiled.cuh"

namespace nf4::cuda {
namespace {

template <class T, class S, class Scaled>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) linear_dgrad_tiled_kernel(const ProductArgs args) {
  linear_dgrad_tiled_block<T, S, Scaled>(args, own_work(args, S::kTileM, blockIdx.z));
}

template <class T, class Warps>
cudaError_t launch_shape(const ProductArgs& args, cudaStream_t stream) {
  using S = DgradShape<Warps>;
  const dim3 grid(unsigned(ceil_div(args.weight.K, S::kTileK)), unsigned(ceil_div(args.M, S::kTileM)),
                  unsigned(args.splits));
  return launch_scaled(args.weight, [&](auto scaled) {
    return launch(linear_dgrad_tiled_kernel<T, S, decltype(scaled)>, grid, S::kThreads, S::kSharedBytes, stream, args);
  });
}

template <class T>
cudaError_t launch_for(const ProductArgs& args, cudaStream_t stream) {
  switch (args.tile) {
    case 0: return launch_shape<T, DgradM16>(args, stream);
    case 1: return launch_shape<T, DgradM32>(args, stream);
    case 2: return launch_shape<T, DgradM64>(args, stream);
    default: return launch_shape<T, DgradM128>(args, stream);
  }
}

}  // namespace

cudaError_t linear_dgrad_tiled(const ProductArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
