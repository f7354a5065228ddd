// grouped_lora_inner: P[M, rank], each row of x[M, depth] times its expert's factor[rank, depth]^T, or
// factor[depth, rank].
//
// Read first: grouped.cuh (which expert and rows a block takes), mma_16x8x16 in device.cuh, product_any.cuh.
//
// Who: a block of 8 warps owns 32 rows of one expert by 16 or 32 ranks. Its warps take turns at 32 of the depth, and
//   their sums are added in order.
// Trick: x, the large operand, is read once for up to 32 ranks, 16 bytes a lane, and goes straight to tensor cores: x is
//   mma's A operand and the factor its B. A contraction has no order, so a lane's 8 consecutive elements stand in the
//   places of two k-steps. A transposed factor is read by single elements; it stays in the L2. Rejected: torch's grouped
//   product, which exists for bf16 on sm_90 and sm_100 alone and wants ranks in eights.
// Bytes: 2 M depth, and the expert's factor from the L2 for each 32 rows: 32768 x 2048 take 31 us on an H200 (4.3 TB/s).
// Needs: bf16 or fp16, depth % 8 == 0 and at most 65536, x and factor aligned to 16 bytes; else the form without tensor
//   cores runs.
#include "grouped.cuh"
#include "product_any.cuh"

namespace nf4::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTilesM = 2, kTileM = 16 * kTilesM;  // mma tiles of 16 rows
constexpr int kStep = 32;                          // of the depth: two k-steps of mma

// The lane's 8 elements of `row` (row g of a tile) from 8t of a step on; zeros past the matrix.
template <class T>
NF4_DEVICE uint4 load_eight(const T* matrix, int64_t row, int64_t rows, int64_t depth, int64_t k) {
  return row < rows && k < depth ? load_cached(reinterpret_cast<const uint4*>(matrix + row * depth + k))
                                 : make_uint4(0, 0, 0, 0);
}
// The same of factor[depth, rank], of which `rank` is a column.
template <class T>
NF4_DEVICE uint4 load_eight_transposed(const T* factor, int64_t rank, int64_t ranks, int64_t depth, int64_t k) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool is_inside = rank < ranks && k < depth;
    const T* from = factor + (k + 2 * i) * ranks + rank;
    pairs[i] = is_inside ? from[0].bits | uint32_t(from[ranks].bits) << 16 : 0u;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <class T, int kRankTiles>
__global__ void __launch_bounds__(kWarps* kWarp) grouped_lora_inner_kernel(const GroupedLoraInnerArgs args) {
  constexpr int kRanks = 8 * kRankTiles;
  const Group group = find_group<kTileM>(Offsets(args.offsets, args.experts, 0, args.M), int(blockIdx.x));
  if (group.m_begin >= group.m_end) return;
  const Lane lane;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t r_begin = int64_t(blockIdx.y) * kRanks;
  const bool is_owned = group.expert < args.experts;
  const T* x = static_cast<const T*>(args.x);
  const T* factor = static_cast<const T*>(args.factor) + (is_owned ? group.expert * args.rank * args.depth : 0);

  float sums[kTilesM][kRankTiles][4] = {};
  const int64_t steps = is_owned ? ceil_div(args.depth, kStep) : 0;
  for (int64_t step = warp; step < steps; step += kWarps) {
    const int64_t k = step * kStep + 8 * lane.t;
    uint32_t a[kTilesM][2][4];  // of the two k-steps
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // row g or g + 8
        const uint4 eight = load_eight(x, group.m_begin + 16 * m + 8 * half + lane.g, group.m_end, args.depth, k);
        a[m][0][half] = eight.x;
        a[m][0][half + 2] = eight.y;
        a[m][1][half] = eight.z;
        a[m][1][half + 2] = eight.w;
      }
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      const int64_t r = r_begin + 8 * tile + lane.g;
      const uint4 b = args.transposed ? load_eight_transposed(factor, r, args.rank, args.depth, k)
                                      : load_eight(factor, r, args.rank, args.depth, k);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma_16x8x16<T>(sums[m][tile], a[m][0], b.x, b.y);
        mma_16x8x16<T>(sums[m][tile], a[m][1], b.z, b.w);
      }
    }
  }

  float* scratch = shared_memory<float>();  // [kWarps, kTileM, kRanks]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scratch[(warp * kTileM + 16 * m + lane.g + 8 * (i / 2)) * kRanks + 8 * tile + 2 * lane.t + i % 2] =
            sums[m][tile][i];
  sync_block();
  for (int i = int(threadIdx.x); i < kTileM * kRanks; i += kWarps * kWarp) {
    const int64_t m = group.m_begin + i / kRanks, r = r_begin + i % kRanks;
    if (m >= group.m_end || r >= args.rank) continue;
    float total = 0;
    for (int from = 0; from < kWarps; ++from) total += scratch[from * kTileM * kRanks + i];
    static_cast<T*>(args.out)[m * args.rank + r] = from_float<T>(total);
  }
}

template <class T>
__global__ void __launch_bounds__(any::kThreads, 2) grouped_lora_inner_any_kernel(const GroupedLoraInnerArgs args) {
  const Group group = find_group<any::kTile>(Offsets(args.offsets, args.experts, 0, args.M), int(blockIdx.x));
  if (group.m_begin >= group.m_end) return;
  const any::Tile tile{group.m_begin, int64_t(blockIdx.y) * any::kTile, group.m_end, args.rank};
  any::Sums sums = {};
  if (group.expert < args.experts) {
    const any::Strided<T> x{static_cast<const T*>(args.x), args.depth, 1};
    const any::Strided<T> factor{static_cast<const T*>(args.factor) + group.expert * args.rank * args.depth,
                                 args.transposed ? args.rank : 1, args.transposed ? 1 : args.depth};
    any::add_product(sums, x, factor, args.depth, tile, shared_memory<float>());
  }
  any::for_each_own(sums, tile, [&](int64_t row, int64_t column, float sum) {
    static_cast<T*>(args.out)[row * args.rank + column] = from_float<T>(sum);
  });
}

template <class T, int kRankTiles>
cudaError_t launch_for(const GroupedLoraInnerArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(most_tiles(args.M, args.experts, kTileM)), unsigned(ceil_div(args.rank, 8 * kRankTiles)));
  const size_t shared_bytes = size_t(kWarps) * kTileM * 8 * kRankTiles * 4;
  return launch(grouped_lora_inner_kernel<T, kRankTiles>, grid, kWarps * kWarp, shared_bytes, stream, args);
}

template <class T>
cudaError_t launch_for(const GroupedLoraInnerArgs& args, cudaStream_t stream) {
  return args.rank <= 16 ? launch_for<T, 2>(args, stream) : launch_for<T, 4>(args, stream);
}

template <class T>
cudaError_t launch_any(const GroupedLoraInnerArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(most_tiles(args.M, args.experts, any::kTile)), unsigned(ceil_div(args.rank, any::kTile)));
  return launch(grouped_lora_inner_any_kernel<T>, grid, any::kThreads, any::kSharedBytes, stream, args);
}

}  // namespace

cudaError_t grouped_lora_inner(const GroupedLoraInnerArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

cudaError_t grouped_lora_inner_any(const GroupedLoraInnerArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32: return launch_any<float>(args, stream);
    case Dtype::kBFloat16: return launch_any<BFloat16>(args, stream);
    default: return launch_any<Float16>(args, stream);
  }
}

}  // namespace nf4::cuda
