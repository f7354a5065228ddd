// grouped_lora_inner: P[M, rank], each row of x[M, depth] times its expert's factor[rank, depth]^T, or
// factor[depth, rank].
//
// Read first: grouped.cuh (which expert and rows a block takes), mma_16x8x16 in device.cuh, product_any.cuh.
//
// Who: a block of 8 warps owns 32 rows of one expert by 16 or 32 ranks. Its warps take turns at 32 of the depth, and
//   their sums are added in order.
// Trick: x, the large operand, is read once for up to 32 ranks, 16 bytes a lane, and goes straight to tensor cores: x is
//   mma's A operand and the factor its B. A contraction has no order, so a lane's 8 consecutive elements stand in the
//   places of two k-steps. Nor is there an order of ranks: column g of mma tile i is rank kRankTiles g + i, so that of a
//   transposed factor a lane's ranks of a row are one load where `rank` is a multiple of kRankTiles. The factor stays in
//   the L2. All loads of a step are in flight before its first product. Rejected: torch's grouped product, which exists
//   for bf16 on sm_90 and sm_100 alone and wants ranks in eights.
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
  const bool is_inside = row < rows && k < depth;
  const uint4 eight = load_cached(reinterpret_cast<const uint4*>(matrix + (is_inside ? row * depth + k : 0)));
  return is_inside ? eight : make_uint4(0, 0, 0, 0);
}

// How the lane loads the kRankTiles ranks from `rank` on that it has of the factor: each 8 elements from k on.
enum class Factor { kRows, kColumns, kWholeColumns };  // of [rank, depth]; of [depth, rank], each row's ranks one load
template <Factor kFactor, class T, int kRankTiles>
NF4_DEVICE void load_factor(uint4 (&eights)[kRankTiles], const T* factor, int64_t rank, int64_t ranks, int64_t depth,
                            int64_t k) {
  if constexpr (kFactor == Factor::kRows) {
#pragma unroll
    for (int i = 0; i < kRankTiles; ++i) eights[i] = load_eight(factor, rank + i, ranks, depth, k);
  } else {
    uint16_t elements[8][kRankTiles];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const T* row = factor + (k < depth ? k + j : 0) * ranks;
      if constexpr (kFactor == Factor::kWholeColumns) {
        using Ranks = std::conditional_t<kRankTiles == 4, uint2, uint32_t>;
        const bool is_inside = k < depth && rank < ranks;
        Ranks of_row = load_cached(reinterpret_cast<const Ranks*>(row + (rank < ranks ? rank : 0)));
        if (!is_inside) of_row = {};
        uint32_t pairs[2];
        if constexpr (kRankTiles == 4) {
          pairs[0] = of_row.x;
          pairs[1] = of_row.y;
        } else {
          pairs[0] = of_row;
        }
#pragma unroll
        for (int i = 0; i < kRankTiles; ++i) elements[j][i] = uint16_t(pairs[i / 2] >> 16 * (i % 2));
      } else {
#pragma unroll
        for (int i = 0; i < kRankTiles; ++i) {
          const bool is_inside = k < depth && rank + i < ranks;
          const uint16_t bits = load_cached(reinterpret_cast<const uint16_t*>(row + (is_inside ? rank + i : 0)));
          elements[j][i] = is_inside ? bits : uint16_t{0};
        }
      }
    }
    const auto pair = [&](int j, int i) { return elements[j][i] | uint32_t(elements[j + 1][i]) << 16; };
#pragma unroll
    for (int i = 0; i < kRankTiles; ++i) eights[i] = make_uint4(pair(0, i), pair(2, i), pair(4, i), pair(6, i));
  }
}

template <int kRankTiles>
using InnerSums = float[kTilesM][kRankTiles][4];

// sums = x @ factor^T of the group's rows: the warp's share of the depth.
template <Factor kFactor, class T, int kRankTiles>
NF4_DEVICE void sum_steps(InnerSums<kRankTiles>& sums, const GroupedLoraInnerArgs& args, const T* factor,
                          const Group& group, int64_t r_begin, int warp, const Lane& lane) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t steps = ceil_div(args.depth, kStep);
#pragma unroll 1
  for (int64_t step = warp; step < steps; step += kWarps) {
    const int64_t k = step * kStep + 8 * lane.t;
    uint4 eights[kTilesM][2], b[kRankTiles];  // rows g and g + 8 of each tile
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        eights[m][half] = load_eight(x, group.m_begin + 16 * m + 8 * half + lane.g, group.m_end, args.depth, k);
    load_factor<kFactor>(b, factor, r_begin + kRankTiles * lane.g, args.rank, args.depth, k);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const uint4 g = eights[m][0], g_8 = eights[m][1];
      const uint32_t first[4] = {g.x, g_8.x, g.y, g_8.y}, second[4] = {g.z, g_8.z, g.w, g_8.w};
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        mma_16x8x16<T>(sums[m][tile], first, b[tile].x, b[tile].y);
        mma_16x8x16<T>(sums[m][tile], second, b[tile].z, b[tile].w);
      }
    }
  }
}

template <class T, int kRankTiles>
__global__ void __launch_bounds__(kWarps* kWarp, kRankTiles == 2 ? 3 : 1)
    grouped_lora_inner_kernel(const GroupedLoraInnerArgs args) {
  constexpr int kRanks = 8 * kRankTiles;
  const Group group = find_group<kTileM>(Offsets(args.offsets, args.experts, 0, args.M), int(blockIdx.x));
  if (group.m_begin >= group.m_end) return;
  const Lane lane;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t r_begin = int64_t(blockIdx.y) * kRanks;
  const bool is_owned = group.expert < args.experts;
  const T* factor = static_cast<const T*>(args.factor) + (is_owned ? group.expert * args.rank * args.depth : 0);
  const bool has_whole = args.rank % kRankTiles == 0;  // the factor is aligned to 16 bytes
  InnerSums<kRankTiles> sums = {};
  if (is_owned && !args.transposed)
    sum_steps<Factor::kRows>(sums, args, factor, group, r_begin, warp, lane);
  else if (is_owned && has_whole)
    sum_steps<Factor::kWholeColumns>(sums, args, factor, group, r_begin, warp, lane);
  else if (is_owned)
    sum_steps<Factor::kColumns>(sums, args, factor, group, r_begin, warp, lane);

  float* scratch = shared_memory<float>();  // [kWarps, kTileM, kRanks]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scratch[(warp * kTileM + 16 * m + lane.g + 8 * (i / 2)) * kRanks + kRankTiles * (2 * lane.t + i % 2) + tile] =
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
