// grouped_linear_dgrad: dX[M, K], each row of dY[M, N] times its expert's W[N, K], by the kernels of linear_dgrad.
//
// Read first: grouped.cuh (which expert and rows a block takes), then linear_dgrad_tiled.cuh, product_any.cuh.
//
// Who: as in those kernels.
// Trick: as in grouped_linear.cu; N is split where a sum would be too long, from 8192 to 32768 n on.
// Flops: 2 M N K; a tile of 16, 32, 64 or 128 m that an expert does not fill costs what a full one does.
// Needs: as those kernels; an expert's rows need no alignment.
#include "grouped.cuh"
#include "linear_dgrad_tiled.cuh"
#include "product_any.cuh"

namespace nf4::cuda {
namespace {

template <class T, class S, class Scaled>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) grouped_linear_dgrad_tiled_kernel(const GroupedArgs args) {
  multiply_group<T, S::kTileM, S::kTileK, Scaled>(args, args.experts.first.K, [&](const auto& work) {
    linear_dgrad_tiled_block<T, S, Scaled>(args.product, work);
  });
}

// Two resident blocks: to fit a third, ptxas would spill.
template <class T>
__global__ void __launch_bounds__(any::kThreads, 2) grouped_linear_dgrad_any_kernel(const GroupedArgs args) {
  multiply_group<T, any::kTile, any::kTile, ScaledLevels>(
      args, args.experts.first.K, [&](const auto& work) { any::product_any_block<T, true>(args.product, work); });
}

template <class T, class Warps>
cudaError_t launch_shape(const GroupedArgs& args, cudaStream_t stream) {
  using S = DgradShape<Warps>;
  return launch_scaled(args.experts.first, [&](auto scaled) {
    return launch(grouped_linear_dgrad_tiled_kernel<T, S, decltype(scaled)>,
                  grouped_grid<S::kTileM, S::kTileK>(args, args.experts.first.K), S::kThreads, S::kSharedBytes, stream,
                  args);
  });
}

template <class T>
cudaError_t launch_tiled(const GroupedArgs& args, cudaStream_t stream) {
  switch (args.product.tile) {
    case 0: return launch_shape<T, DgradM16>(args, stream);
    case 1: return launch_shape<T, DgradM32>(args, stream);
    case 2: return launch_shape<T, DgradM64>(args, stream);
    default: return launch_shape<T, DgradM128>(args, stream);
  }
}

template <class T>
cudaError_t launch_any(const GroupedArgs& args, cudaStream_t stream) {
  return launch(grouped_linear_dgrad_any_kernel<T>, grouped_grid<any::kTile, any::kTile>(args, args.experts.first.K),
                any::kThreads, any::kSharedBytes, stream, args);
}

}  // namespace

cudaError_t grouped_linear_dgrad_tiled(const GroupedArgs& args, cudaStream_t stream) {
  return args.product.dtype == Dtype::kBFloat16 ? launch_tiled<BFloat16>(args, stream)
                                                : launch_tiled<Float16>(args, stream);
}

cudaError_t grouped_linear_dgrad_any(const GroupedArgs& args, cudaStream_t stream) {
  switch (args.product.dtype) {
    case Dtype::kFloat32: return launch_any<float>(args, stream);
    case Dtype::kBFloat16: return launch_any<BFloat16>(args, stream);
    default: return launch_any<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
