// reduce_splits: out[rows, columns] = scaling * sum over s of partial[s, rows, columns] + bias[columns], or transposed.
//
// Who: a grid-stride loop, four elements a thread, or one where they are not aligned. Of the transpose a block takes
//   elements of one row.
// Trick: the sum runs over s in order and gives the same bits every time. Rejected: atomics, which add in the order of
//   arrival. Where blocks can count their arrivals, the last one adds instead, in the same launch (split_sums.cuh).
// Bytes: 4 splits + 2 an element, from the L2, where the product's launch has just written them.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;

// A grid-stride loop.
template <class F>
NF4_DEVICE void for_each(int64_t count, F&& f) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) f(i);
}

// `sum` with the bias of element i of out added.
template <class T>
NF4_DEVICE float with_bias(const ReduceArgs& args, int64_t i, float sum) {
  return args.bias == nullptr ? sum : sum + to_float(static_cast<const T*>(args.bias)[i % args.columns]);
}

NF4_DEVICE float total(const ReduceArgs& args, int64_t i) {
  float sum = 0;
#pragma unroll 4
  for (int s = 0; s < args.splits; ++s) sum += load_cached(args.partial + s * args.rows * args.columns + i);
  return sum * args.scaling;
}

// kWidth: 4, where partial and out are aligned to 16 bytes and a split is whole vectors; or 1.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(const ReduceArgs args) {
  const int64_t count = args.rows * args.columns / kWidth;
  if constexpr (kWidth == 1) {
    for_each(count,
             [&](int64_t i) { static_cast<T*>(args.out)[i] = from_float<T>(with_bias<T>(args, i, total(args, i))); });
  } else {
    for_each(count, [&](int64_t i) {
      float sums[kWidth] = {};
#pragma unroll 4
      for (int s = 0; s < args.splits; ++s) {
        const uint4 four = load_cached(reinterpret_cast<const uint4*>(args.partial) + s * count + i);
        sums[0] += float_of(four.x);
        sums[1] += float_of(four.y);
        sums[2] += float_of(four.z);
        sums[3] += float_of(four.w);
      }
      for (int j = 0; j < kWidth; ++j) sums[j] = with_bias<T>(args, kWidth * i + j, sums[j] * args.scaling);
      if constexpr (std::is_same_v<T, float>)
        static_cast<uint4*>(args.out)[i] =
            make_uint4(bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3]));
      else
        static_cast<uint2*>(args.out)[i] = make_uint2(pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]));
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_splits_transposed_kernel(const ReduceArgs args) {
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y)
    for_each(args.columns, [&](int64_t column) {
      static_cast<T*>(args.out)[column * args.rows + row] = from_float<T>(total(args, row * args.columns + column));
    });
}

template <class T>
cudaError_t launch_for(const ReduceArgs& args, cudaStream_t stream) {
  if (args.transposed) {
    constexpr int64_t kMostRows = 65535;  // of a grid
    const dim3 grid(blocks_for(args.columns, kThreads), unsigned(smaller(args.rows, kMostRows)));
    return launch(reduce_splits_transposed_kernel<T>, grid, kThreads, 0, stream, args);
  }
  const int64_t count = args.rows * args.columns;
  const bool is_wide = count % 4 == 0 && (uintptr_t(args.partial) | uintptr_t(args.out)) % 16 == 0;
  return is_wide ? launch(reduce_splits_kernel<T, 4>, blocks_for(count / 4, kThreads), kThreads, 0, stream, args)
                 : launch(reduce_splits_kernel<T, 1>, blocks_for(count, kThreads), kThreads, 0, stream, args);
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
