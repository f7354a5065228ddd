// linear for at most 16 rows of x: one block of linear_small.cuh, with all of M in a tile of 8 or 16, a tile of N and a
// split of K.
#include "linear_small.cuh"

namespace nf4::cuda {
namespace {

using namespace small;

template <class T, int kTilesM, class Scaled>
__global__ void __launch_bounds__(kWarps* kWarp, 2) linear_small_kernel(const ProductArgs args) {
  linear_small_block<T, kTilesM, Scaled>(args, Work<int64_t>{args.weight, blockIdx.x, 0, args.M, blockIdx.y, 0});
}

template <class T>
cudaError_t launch_for(const ProductArgs& args, cudaStream_t stream) {
  return launch_scaled(args.weight, [&](auto scaled) {
    using Scaled = decltype(scaled);
    const auto kernel = args.M <= 8 ? linear_small_kernel<T, 1, Scaled> : linear_small_kernel<T, 2, Scaled>;
    const dim3 grid(unsigned(ceil_div(args.weight.N, kTileN)), unsigned(args.splits));
    return launch(kernel, grid, kWarps * kWarp, small::kSharedBytes, stream, args);
  });
}

}  // namespace

cudaError_t linear_small(const ProductArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
