// The sum over splits in the launch that computes them: the last block of an output tile to arrive adds up, in order,
// what the others have written. Read first: arrivals.cuh.
//
// Who: every block writes its sums as its threads hold them, 16 bytes a thread; the last one adds, a thread the sums of
//   the same thread of each block.
// Trick: fragments are added, so that nothing is rearranged. The order of the splits is that of reduce_splits, and so are
//   the bits. Rejected: the last block's own sums kept in registers until their turn, which spills 114 to 141 loads and
//   stores in linear_dgrad, whose sums take 128 registers.
// Bytes: 4 written a sum and 4 read, in the L2. 64 x 128 sums, 4 splits: by count 128 KB, 4100 cycles of a block that
//   reads 32 bytes a cycle, as long as a second launch on an H200 takes before it begins to read.
#pragma once

#include "arrivals.cuh"
#include "product.cuh"
#include "tiles.h"

namespace nf4::cuda {

static_assert(kMostArrivals <= kArrivals, "every output tile has a counter");

// Whether this block holds the totals now and stores them; else it is done. sum(i) is the thread's i-th of kCount sums;
// the first kOwners threads have sums. args.partial: [output tiles, splits, kCount / 4, kOwners, 4].
template <int kCount, int kOwners, class Sum>
NF4_DEVICE bool add_splits_in_launch(const ProductArgs& args, int split, Sum&& sum) {
  static_assert(kCount % 4 == 0, "16 bytes at a time");
  const int tile = int(blockIdx.y * gridDim.x + blockIdx.x), owner = int(threadIdx.x);
  constexpr int64_t kSize = int64_t{kCount} * kOwners;
  float* const first = args.partial + tile * args.splits * kSize + 4 * owner;  // split 0's
  if (owner < kOwners) {
    float* own = first + split * kSize;
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<uint4*>(own + i * kOwners) =
          make_uint4(bits_of(sum(i)), bits_of(sum(i + 1)), bits_of(sum(i + 2)), bits_of(sum(i + 3)));
  }
  if (!is_last_to_arrive(args.arrivals, tile, args.splits, shared_memory<uint32_t>())) return false;
  if (owner >= kOwners) return true;

  constexpr int kAtOnce = kCount < 64 ? kCount : 64;  // more sums' loads in flight would spill beside 128 sums
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kAtOnce) {
#pragma unroll
    for (int i = begin; i < begin + kAtOnce; ++i) sum(i) = 0;
#pragma unroll(kAtOnce <= 32 ? 2 : 1)
    for (int s = 0; s < args.splits; ++s) {
      const uint4* from = reinterpret_cast<const uint4*>(first + s * kSize);
#pragma unroll
      for (int i = begin; i < begin + kAtOnce; i += 4) {
        const uint4 four = load_l2(from + i / 4 * kOwners);
        sum(i) += float_of(four.x);
        sum(i + 1) += float_of(four.y);
        sum(i + 2) += float_of(four.z);
        sum(i + 3) += float_of(four.w);
      }
    }
  }
  return true;
}

}  // namespace nf4::cuda
