// grouped_linear: y[M, N], each row of x[M, K] times its expert's W[N, K]^T, by the kernels of linear.
//
// Read first: grouped.cuh (which expert and rows a block takes), then grouped_linear_small.cuh, linear_tiled.cuh,
//   product_any.cuh.
//
// Who: as in those kernels.
// Trick: nothing is sorted, padded or copied, and the host does not wait. The 8 experts (of 128) of one token are 8
//   tiles along M; with N = 2048 their 512 blocks fill the 264 that an H200 holds, so K is split only where a sum would
//   be too long.
// Bytes: 0.516 N K for each expert that has rows (and once more from the L2 for each further tile of its rows).
// Needs: as those kernels; an expert's rows need no alignment.
#include "grouped.cuh"
#include "grouped_linear_small.cuh"
#include "linear_tiled.cuh"
#include "product_any.cuh"

namespace nf4::cuda {
namespace {

template <class T, int kTilesM, class Scaled>
__global__ void __launch_bounds__(small::kWarps* kWarp, 2) grouped_linear_small_kernel(const GroupedArgs args) {
  multiply_group<T, 8 * kTilesM, small::kTileN, Scaled>(args, args.experts.first.N, [&](const auto& work) {
    small::linear_small_block<T, kTilesM, Scaled>(args.product, work);
  });
}

template <class T, class S, class Scaled>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) grouped_linear_tiled_kernel(const GroupedArgs args) {
  multiply_group<T, S::kTileM, S::kTileN, Scaled>(
      args, args.experts.first.N, [&](const auto& work) { linear_tiled_block<T, S, Scaled>(args.product, work); });
}

// Two resident blocks: to fit a third, ptxas would spill.
template <class T>
__global__ void __launch_bounds__(any::kThreads, 2) grouped_linear_any_kernel(const GroupedArgs args) {
  multiply_group<T, any::kTile, any::kTile, ScaledLevels>(
      args, args.experts.first.N, [&](const auto& work) { any::product_any_block<T, false>(args.product, work); });
}

template <class T>
cudaError_t launch_small(const GroupedArgs& args, cudaStream_t stream) {
  const auto launch_tile = [&](auto kernel, dim3 grid) {
    return launch(kernel, grid, small::kWarps * kWarp, small::kSharedBytes, stream, args);
  };
  const int64_t N = args.experts.first.N;
  return launch_scaled(args.experts.first, [&](auto scaled) {
    using Scaled = decltype(scaled);
    if (args.m_per_expert <= 8)
      return launch_tile(grouped_linear_small_kernel<T, 1, Scaled>, grouped_grid<8, small::kTileN>(args, N));
    return launch_tile(grouped_linear_small_kernel<T, 2, Scaled>, grouped_grid<16, small::kTileN>(args, N));
  });
}

template <class T, class Warps>
cudaError_t launch_shape(const GroupedArgs& args, cudaStream_t stream) {
  using S = LinearShape<Warps>;
  return launch_scaled(args.experts.first, [&](auto scaled) {
    return launch(grouped_linear_tiled_kernel<T, S, decltype(scaled)>,
                  grouped_grid<S::kTileM, S::kTileN>(args, args.experts.first.N), S::kThreads, S::kSharedBytes, stream,
                  args);
  });
}

template <class T>
cudaError_t launch_tiled(const GroupedArgs& args, cudaStream_t stream) {
  switch (args.product.tile) {
    case 0: return launch_shape<T, LinearM32>(args, stream);
    case 1: return launch_shape<T, LinearM64>(args, stream);
    default: return launch_shape<T, LinearM128>(args, stream);
  }
}

template <class T>
cudaError_t launch_any(const GroupedArgs& args, cudaStream_t stream) {
  return launch(grouped_linear_any_kernel<T>, grouped_grid<any::kTile, any::kTile>(args, args.experts.first.N),
                any::kThreads, any::kSharedBytes, stream, args);
}

}  // namespace

cudaError_t grouped_linear_small(const GroupedArgs& args, cudaStream_t stream) {
  return args.product.dtype == Dtype::kBFloat16 ? launch_small<BFloat16>(args, stream)
                                                : launch_small<Float16>(args, stream);
}

cudaError_t grouped_linear_tiled(const GroupedArgs& args, cudaStream_t stream) {
  return args.product.dtype == Dtype::kBFloat16 ? launch_tiled<BFloat16>(args, stream)
                                                : launch_tiled<Float16>(args, stream);
}

cudaError_t grouped_linear_any(const GroupedArgs& args, cudaStream_t stream) {
  switch (args.product.dtype) {
    case Dtype::kFloat32: return launch_any<float>(args, stream);
    case Dtype::kBFloat16: return launch_any<BFloat16>(args, stream);
    default: return launch_any<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
