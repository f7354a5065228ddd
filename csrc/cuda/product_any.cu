// linear, linear_dgrad and lora_grad for any shape, block size, dtype and alignment: one block of product_any.cuh a
// tile.
#include "product_any.cuh"

namespace nf4::cuda {
namespace {

using namespace any;

template <class T, bool kDgrad>
__global__ void __launch_bounds__(kThreads, kBlocks) product_any_kernel(const ProductArgs args) {
  product_any_block<T, kDgrad>(args, own_work(args, kTile, 0));
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads) lora_grad_any_kernel(const LoraGradArgs args) {
  const Tile tile{int64_t(blockIdx.y) * kTile, int64_t(blockIdx.x) * kTile, args.rank, args.columns};
  Sums sums = {};
  add_product(sums, Strided<T>{static_cast<const T*>(args.small), 1, args.rank},
              Strided<T>{static_cast<const T*>(args.wide), args.columns, 1}, args.M, tile, shared_memory<float>());
  for_each_own(sums, tile, [&](int64_t row, int64_t column, float sum) {
    const int64_t to = args.transposed ? column * args.rank + row : row * args.columns + column;
    static_cast<Out*>(args.out)[to] = from_float<Out>(sum * args.scaling);
  });
}

template <class Kernel, class Args>
cudaError_t launch_tiles(Kernel kernel, int64_t rows, int64_t columns, const Args& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(columns, kTile)), unsigned(ceil_div(rows, kTile)));
  return launch(kernel, grid, kThreads, kSharedBytes, stream, args);
}

template <bool kDgrad>
cudaError_t product_any(const ProductArgs& args, cudaStream_t stream) {
  const auto kernel = args.dtype == Dtype::kFloat32    ? product_any_kernel<float, kDgrad>
                      : args.dtype == Dtype::kBFloat16 ? product_any_kernel<BFloat16, kDgrad>
                                                       : product_any_kernel<Float16, kDgrad>;
  return launch_tiles(kernel, args.M, kDgrad ? args.weight.K : args.weight.N, args, stream);
}

template <class T>
cudaError_t lora_grad_any_for(const LoraGradArgs& args, cudaStream_t stream) {
  const auto kernel = args.out_dtype == Dtype::kFloat32    ? lora_grad_any_kernel<T, float>
                      : args.out_dtype == Dtype::kBFloat16 ? lora_grad_any_kernel<T, BFloat16>
                                                           : lora_grad_any_kernel<T, Float16>;
  return launch_tiles(kernel, args.rank, args.columns, args, stream);
}

}  // namespace

cudaError_t linear_any(const ProductArgs& args, cudaStream_t stream) { return product_any<false>(args, stream); }
cudaError_t linear_dgrad_any(const ProductArgs& args, cudaStream_t stream) { return product_any<true>(args, stream); }

cudaError_t lora_grad_any(const LoraGradArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32: return lora_grad_any_for<float>(args, stream);
    case Dtype::kBFloat16: return lora_grad_any_for<BFloat16>(args, stream);
    default: return lora_grad_any_for<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
