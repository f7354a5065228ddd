// grouped_lora_grad: out[e, rank, columns] = scaling * small^T @ wide over the rows of each expert e, or out[e]^T.
//
// Read first: lora_grad.cuh (a block's sums), grouped.cuh (an expert's rows), product_any.cuh.
//
// Who: a block owns one expert, 16 or 32 ranks and 64 columns, and all of the expert's rows.
// Trick: that of lora_grad. Experts are blocks enough: 128 of 2048 columns are 4096, so that rows are not split; a run of
//   512 mma's ends after 65536 rows, and the next one is added to it. An expert without rows becomes zeros.
// Bytes: 2 M columns; 32768 x 2048: 31 us on an H200 (4.3 TB/s).
// Needs: bf16 or fp16, columns % 8 == 0, all pointers aligned to 16 bytes; else the form without tensor cores runs.
#include "grouped.cuh"
#include "lora_grad.cuh"
#include "product_any.cuh"

namespace nf4::cuda {
namespace {

using lora_grad_block::store_grad;

// Where an expert's gradient begins in out.
NF4_DEVICE int64_t begin_of(const GroupedLoraGradArgs& args, int expert) {
  return expert * args.grad.rank * args.grad.columns;
}

NF4_DEVICE Group rows_of(const GroupedLoraGradArgs& args, int expert) {
  return rows_of(Offsets(args.offsets, args.experts, 0, args.grad.M), expert);
}

template <class T, int kRankTiles>
__global__ void __launch_bounds__(lora_grad_block::kWarps* kWarp, lora_grad_block::kBlocks<kRankTiles>)
    grouped_lora_grad_kernel(const GroupedLoraGradArgs args) {
  using namespace lora_grad_block;
  constexpr int64_t kRun = int64_t{kWarps} * 512 * kStep;  // rows
  const int expert = int(blockIdx.y);
  const Group group = rows_of(args, expert);
  Grad<T, kRankTiles> grad(args.grad, int64_t(blockIdx.x) * kColumns, int64_t(blockIdx.z) * 8 * kRankTiles);
  int64_t begin = group.m_begin;
  do {  // once, also without rows
    const int64_t end = smaller(begin + kRun, group.m_end);
    grad.sum(begin, end);
    grad.keep(begin == group.m_begin);
    begin = end;
  } while (begin < group.m_end);
  grad.finish(
      [&](int64_t r, int64_t column, float total) { store_grad(args.grad, begin_of(args, expert), r, column, total); });
}

template <class T>
__global__ void __launch_bounds__(any::kThreads, 2) grouped_lora_grad_any_kernel(const GroupedLoraGradArgs args) {
  const auto& grad = args.grad;
  const int expert = int(blockIdx.z);
  const Group group = rows_of(args, expert);
  const any::Tile tile{int64_t(blockIdx.y) * any::kTile, int64_t(blockIdx.x) * any::kTile, grad.rank, grad.columns};
  any::Sums sums = {};
  const any::Strided<T> small{static_cast<const T*>(grad.small) + group.m_begin * grad.rank, 1, grad.rank};
  const any::Strided<T> wide{static_cast<const T*>(grad.wide) + group.m_begin * grad.columns, grad.columns, 1};
  any::add_product(sums, small, wide, group.m_end - group.m_begin, tile, shared_memory<float>());
  any::for_each_own(sums, tile, [&](int64_t r, int64_t column, float sum) {
    store_grad(grad, begin_of(args, expert), r, column, sum);
  });
}

template <class T, int kRankTiles>
cudaError_t launch_for(const GroupedLoraGradArgs& args, cudaStream_t stream) {
  using namespace lora_grad_block;
  const dim3 grid(unsigned(ceil_div(args.grad.columns, kColumns)), unsigned(args.experts),
                  unsigned(ceil_div(args.grad.rank, 8 * kRankTiles)));
  return launch(grouped_lora_grad_kernel<T, kRankTiles>, grid, kWarps * kWarp, kSharedBytes<kRankTiles>, stream, args);
}

template <class T>
cudaError_t launch_for(const GroupedLoraGradArgs& args, cudaStream_t stream) {
  return args.grad.rank <= 16 ? launch_for<T, 2>(args, stream) : launch_for<T, 4>(args, stream);
}

template <class T>
cudaError_t launch_any(const GroupedLoraGradArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.grad.columns, any::kTile)), unsigned(ceil_div(args.grad.rank, any::kTile)),
                  unsigned(args.experts));
  return launch(grouped_lora_grad_any_kernel<T>, grid, any::kThreads, any::kSharedBytes, stream, args);
}

}  // namespace

cudaError_t grouped_lora_grad(const GroupedLoraGradArgs& args, cudaStream_t stream) {
  return args.grad.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

cudaError_t grouped_lora_grad_any(const GroupedLoraGradArgs& args, cudaStream_t stream) {
  switch (args.grad.dtype) {
    case Dtype::kFloat32: return launch_any<float>(args, stream);
    case Dtype::kBFloat16: return launch_any<BFloat16>(args, stream);
    default: return launch_any<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
