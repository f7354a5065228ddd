// scaled_copy: out[rows, width] = scaling * in[rows, columns], padded with zeros. dequantize + GEMM puts LoRA's P or Q
// beside x or dY with it, so that one product with [Ŵ | s B] does both, and makes s B itself.
//
// Who: a grid-stride loop, an element a thread. Bytes: 2 (columns + width) a row, negligible beside the product's.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) scaled_copy_kernel(const ScaledCopyArgs args) {
  const int64_t count = args.rows * args.width;
  const T* in = static_cast<const T*>(args.in);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / args.width, column = i % args.width;
    const float value = column < args.columns ? to_float(in[row * args.columns + column]) * args.scaling : 0.f;
    static_cast<T*>(args.out)[row * args.stride + column] = from_float<T>(value);
  }
}

template <class T>
cudaError_t launch_for(const ScaledCopyArgs& args, cudaStream_t stream) {
  return launch(scaled_copy_kernel<T>, blocks_for(args.rows * args.width, kThreads), kThreads, 0, stream, args);
}

}  // namespace

cudaError_t scaled_copy(const ScaledCopyArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
