// linear for many rows of x: linear_tiled.cuh's work, a tile of 32, 64 or 128 tokens a block and one of `splits` parts.
#include "linear_tiled.cuh"

namespace nf4::cuda {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) linear_tiled_kernel(const ProductArgs args) {
  linear_tiled_block<T, S>(args, own_work(args, S::kTokens, blockIdx.z));
}

template <class T, class S>
cudaError_t launch_shape(const ProductArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.weight.N, S::kRows)), unsigned(ceil_div(args.M, S::kTokens)),
                  unsigned(args.splits));
  return launch(linear_tiled_kernel<T, S>, grid, S::kThreads, S::kSharedBytes, stream, args);
}

template <class T>
cudaError_t launch_for(const ProductArgs& args, cudaStream_t stream) {
  switch (tile_index(kLinearTiles, args.M)) {
    case 0: return launch_shape<T, LinearTokens32>(args, stream);
    case 1: return launch_shape<T, LinearTokens64>(args, stream);
    default: return launch_shape<T, LinearTokens128>(args, stream);
  }
}

}  // namespace

cudaError_t linear_tiled(const ProductArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
