// reduce_splits: out[rows, columns] = scaling * sum over s of partial[s, rows, columns], or its transpose.
//
// Who: a grid-stride loop, four elements a thread, or one where they are not aligned. Of the transpose a block takes
//   elements of one row.
// Trick: the sum runs over s in order and gives the same bits every time. Rejected: atomics, which add in the order of
//   arrival. Most sums of the tiled products never come here: split_sums.cuh.
// Bytes: 4 splits + 2 an element, from the L2, where the product's launch has just written them.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256, kWide = 4;

template <class T>
struct Total {
  const ReduceArgs& args;
  int64_t count;
  NF4_DEVICE explicit Total(const ReduceArgs& args) : args(args), count(args.rows * args.columns) {}

  NF4_DEVICE T one(int64_t i) const {
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < args.splits; ++s) sum += load_cached(args.partial + s * count + i);
    return from_float<T>(sum * args.scaling);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(const ReduceArgs args) {
  const Total<T> total(args);
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  T* const out = static_cast<T*>(args.out);
  for (int64_t i = first; i < total.count; i += step) out[i] = total.one(i);
}

// Four elements at a time: of a whole number of them, aligned to 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_splits_wide_kernel(const ReduceArgs args) {
  const int64_t vectors = args.rows * args.columns / kWide;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = first; i < vectors; i += step) {
    const uint4* from = reinterpret_cast<const uint4*>(args.partial) + i;
    float sums[kWide] = {};
#pragma unroll 4
    for (int s = 0; s < args.splits; ++s) {
      const uint4 four = load_cached(from + s * vectors);
      sums[0] += float_of(four.x);
      sums[1] += float_of(four.y);
      sums[2] += float_of(four.z);
      sums[3] += float_of(four.w);
    }
    for (float& sum : sums) sum *= args.scaling;
    if constexpr (std::is_same_v<T, float>)
      reinterpret_cast<uint4*>(args.out)[i] =
          make_uint4(bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3]));
    else
      reinterpret_cast<uint2*>(args.out)[i] = make_uint2(pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_splits_transposed_kernel(const ReduceArgs args) {
  const Total<T> total(args);
  T* const out = static_cast<T*>(args.out);
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y)
    for (int64_t column = first; column < args.columns; column += step)
      out[column * args.rows + row] = total.one(row * args.columns + column);
}

template <class T>
cudaError_t launch_for(const ReduceArgs& args, cudaStream_t stream) {
  const int64_t count = args.rows * args.columns;
  if (args.transposed) {
    constexpr int64_t kMostRows = 65535;  // of a grid
    const dim3 grid(blocks_for(args.columns, kThreads), unsigned(smaller(args.rows, kMostRows)));
    return launch(reduce_splits_transposed_kernel<T>, grid, kThreads, 0, stream, args);
  }
  const bool is_aligned = (uintptr_t(args.partial) | uintptr_t(args.out)) % 16 == 0;
  if (is_aligned && count % kWide == 0)
    return launch(reduce_splits_wide_kernel<T>, blocks_for(count / kWide, kThreads), kThreads, 0, stream, args);
  return launch(reduce_splits_kernel<T>, blocks_for(count, kThreads), kThreads, 0, stream, args);
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
