// scale_low_rank: out[rows, width] = scaling * small[rows, rank], zeros beyond rank: LoRA's P or Q beside x or dY, so that
// one product with a panel of [Ŵ | s B] does both; and s B itself.
//
// Who: a thread an element. Bytes: 2 (rank + width) a row, nothing beside the product's.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_low_rank_kernel(const ScaleLowRankArgs args) {
  const int64_t count = args.rows * args.width;
  const T* small = static_cast<const T*>(args.small);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / args.width, column = i % args.width;
    const float value = column < args.rank ? to_float(small[row * args.rank + column]) * args.scaling : 0.f;
    static_cast<T*>(args.out)[row * args.stride + column] = from_float<T>(value);
  }
}

template <class T>
cudaError_t launch_for(const ScaleLowRankArgs& args, cudaStream_t stream) {
  return launch(scale_low_rank_kernel<T>, blocks_for(args.rows * args.width, kThreads), kThreads, 0, stream, args);
}

}  // namespace

cudaError_t scale_low_rank(const ScaleLowRankArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
