// reduce_splits: out[rows, columns] = scaling * sum over s of partial[s, rows, columns], or its transpose.
//
// Who: a grid-stride loop, an element a thread.
// Trick: the sum runs over s in order and gives the same bits every time. Rejected: atomics, which add in the order of
//   arrival; reducing in the product's launch, whose arrival counter would have to be zeroed before and after.
// Bytes: 4 splits + 2 an element, from the L2, where the product's launch has just written them.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(const ReduceArgs args) {
  const int64_t count = args.rows * args.columns;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / args.columns, column = i % args.columns;
    float sum = 0;
    for (int s = 0; s < args.splits; ++s) sum += load_cached(args.partial + s * count + i);
    sum *= args.scaling;
    static_cast<T*>(args.out)[args.transposed ? column * args.rows + row : i] = from_float<T>(sum);
  }
}

template <class T>
cudaError_t launch_for(const ReduceArgs& args, cudaStream_t stream) {
  return launch(reduce_splits_kernel<T>, blocks_for(args.rows * args.columns, kThreads), kThreads, 0, stream, args);
}

}  // namespace

cudaError_t reduce_splits(const ReduceArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32: return launch_for<float>(args, stream);
    case Dtype::kBFloat16: return launch_for<BFloat16>(args, stream);
    default: return launch_for<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
